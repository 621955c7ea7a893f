"""The decode loop of the transformers engine: one batch of rollouts on transformers' model, with its KV cache.

Each prompt of the batch is read once, images included, and its cache is copied to its rollouts. Prompts are padded on
the left. Rows that have ended leave the batch. Left out: paged memory, chunked prefill, anything a serving engine does.

Of a family's model it needs what `transformers_classes` offers: `position_ids` of padded prompts, and a `forward` that
keeps keys and values in a transformers `DynamicCache` and heeds an attention mask over padded rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from megatron_papo.generation.generator import Sampling
from megatron_papo.generation.reference_model import classes_of_model
from megatron_papo.generation.requests import Answer, RolloutRequest
from megatron_papo.generation.sampling import draw, sampled_logprobs, uniforms
from megatron_papo.types import Prompt


@torch.inference_mode()
def decode_batch(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    requests: list[RolloutRequest],
    sampling: Sampling,
    banned_ids: Tensor,
    eos_ids: Tensor,
) -> list[Answer]:
    """Answers to `requests`, in their order; a request's `prompt_index` is a place in `prompts`.

    `banned_ids`, int64, are never sampled; a response ends with one of `eos_ids`, int64, unless `sampling`
    ignores them, or at its longest.
    """
    places = sorted({request.prompt_index for request in requests})
    prompt_of_B = torch.tensor([places.index(request.prompt_index) for request in requests], device=model.device)
    batch = _Batch(model, [prompts[place] for place in places], prompt_of_B, sampling)
    uniform_BN = uniforms([request.seed for request in requests], sampling.max_response_tokens).to(model.device)
    ids_BN = torch.zeros(uniform_BN.shape, dtype=torch.int64, device=model.device)
    logprobs_BN = torch.zeros(uniform_BN.shape, device=model.device)
    length_B = torch.full((len(requests),), sampling.max_response_tokens, device=model.device)
    stopped_B = torch.zeros(len(requests), dtype=torch.bool, device=model.device)
    for place in range(sampling.max_response_tokens):
        logprobs_AV = sampled_logprobs(batch.logits_AV, sampling, banned_ids)
        ids_A, logprobs_A = draw(logprobs_AV, uniform_BN[batch.row_A, place], sampling)
        ids_BN[batch.row_A, place], logprobs_BN[batch.row_A, place] = ids_A, logprobs_A
        ended_A = torch.isin(ids_A, eos_ids) & ~stopped_B[batch.row_A] & (not sampling.ignore_eos)
        stopped_B[batch.row_A[ended_A]] = True
        length_B[batch.row_A[ended_A]] = place + 1
        if place + 1 == sampling.max_response_tokens or not batch.advance(ids_A, ~stopped_B[batch.row_A]):
            break
    return _answers(requests, ids_BN, logprobs_BN, length_B, stopped_B)


def _answers(
    requests: list[RolloutRequest], ids_BN: Tensor, logprobs_BN: Tensor, length_B: Tensor, stopped_B: Tensor
) -> list[Answer]:
    rows = zip(requests, ids_BN.tolist(), logprobs_BN.tolist(), length_B.tolist(), stopped_B.tolist())
    return [
        Answer(request, tuple(ids[:length]), tuple(logprobs[:length]), "stop" if stopped else "length")
        for request, ids, logprobs, length, stopped in rows
    ]


class _Batch:
    """The A rows that still run, of the B rows of the batch, and what the next step needs of each.

    `row_A`: which of the B rows they are; `logits_AV`: logits of the next token; `next_position_A`: its position;
    `mask_AK`: which of the keys in the cache are tokens and not padding.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: list[Prompt],
        prompt_of_B: Tensor,
        sampling: Sampling,
    ):
        self.model, self.classes = model, classes_of_model(model)
        self.cache = DynamicCache(config=model.config)
        length = max(prompt.inputs.token_ids_S.numel() for prompt in prompts)
        mask_PK, logits_PV, next_position_P = self._read(prompts, length, sampling.masked)
        self.cache.batch_select_indices(prompt_of_B)
        self.row_A = torch.arange(prompt_of_B.numel(), device=model.device)
        self.logits_AV = logits_PV[prompt_of_B]
        self.next_position_A = next_position_P[prompt_of_B]
        self.num_keys = length
        answer_mask_PN = mask_PK.new_ones(len(prompts), sampling.max_response_tokens)
        self.mask_AK = torch.cat((mask_PK, answer_mask_PN), dim=1)[prompt_of_B]

    def _read(self, prompts: list[Prompt], length: int, masked: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Fills the cache. Returns key mask [P, length], last logits [P, V] and next position [P]."""
        device, model = self.model.device, self.model
        ids_PK = torch.full((len(prompts), length), model.config.get_text_config().pad_token_id or 0)
        mask_PK = torch.zeros(len(prompts), length, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids_S = prompt.inputs.token_ids_S
            ids_PK[row, length - ids_S.numel() :] = ids_S
            mask_PK[row, length - ids_S.numel() :] = 1
        pixels_PD, grid_I3 = _images(prompts, masked)
        position_3PK = self.classes.position_ids(model, ids_PK, grid_I3, mask_PK)
        logits_P1V = self.classes.forward(
            model,
            ids_PK.to(device),
            position_3PK.to(device),
            pixel_values_PD=None if pixels_PD is None else pixels_PD.to(device),
            grid_thw_I3=None if grid_I3 is None else grid_I3.to(device),
            attention_mask_BK=mask_PK.to(device),
            cache=self.cache,
        )
        return mask_PK.to(device), logits_P1V[:, 0], position_3PK.amax((0, 2)).to(device) + 1

    def advance(self, ids_A: Tensor, running_A: Tensor) -> bool:
        """Appends a token to every row and computes the logits of the next; False when no row runs any more.

        Ended rows are dropped once an eighth has ended: dropping copies the cache.
        """
        num_running = int(running_A.sum())
        if num_running == 0:
            return False
        if num_running <= 0.875 * running_A.numel():
            keep = running_A.nonzero()[:, 0]
            ids_A = ids_A[keep]
            self.row_A, self.mask_AK = self.row_A[keep], self.mask_AK[keep]
            self.next_position_A = self.next_position_A[keep]
            self.cache.batch_select_indices(keep)
        self.num_keys += 1
        self.logits_AV = self.classes.forward(
            self.model,
            ids_A[:, None],
            self.next_position_A[None, :, None].expand(3, -1, -1),
            attention_mask_BK=self.mask_AK[:, : self.num_keys],
            cache=self.cache,
        )[:, 0]
        self.next_position_A = self.next_position_A + 1
        return True


def _images(prompts: list[Prompt], masked: bool) -> tuple[Tensor | None, Tensor | None]:
    """Patches and grids of all images, in the order of the prompts; None where no prompt has an image.

    `masked`: of the masked view. Raises ValueError naming a prompt that has images and no masked view.
    """
    pixels: list[Tensor] = []
    grids: list[Tensor] = []
    for prompt in prompts:
        if prompt.inputs.pixel_values_PD is None:
            continue
        view_PD = prompt.masked_pixel_values_PD if masked else prompt.inputs.pixel_values_PD
        if view_PD is None:
            raise ValueError(f"prompt {prompt.id}: masked rollouts asked for, and it has no masked view")
        assert prompt.inputs.grid_thw_I3 is not None
        pixels.append(view_PD)
        grids.append(prompt.inputs.grid_thw_I3)
    return (torch.cat(pixels), torch.cat(grids)) if pixels else (None, None)
