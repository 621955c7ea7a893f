"""PAPO in plain PyTorch on a transformers model, written from the paper: what one would write first.

A padded batch of rollouts at a time, each with its own copy of prompt and pixels; one forward with the picture, one
with the picture masked (without gradient for the frozen branch, with it for the joint one); logits of the response
tokens only. Leaves out what a single on-line update does not need: reference, entropy, several updates a batch.
Source: arXiv 2507.06448; the clamps are those of its reference code.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import batched
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel

from benchmarks.ours import LEARNING_RATE, Key
from benchmarks.padded import image_inputs, pad_left, pad_right, without_cuda_mode
from megatron_papo.types import Group, Prompt, Rollout

PERCEPTION_COEF = 0.02
CLIP_LOW, CLIP_HIGH, DUAL_CLIP = 0.2, 0.3, 3.0

Sample = tuple[Prompt, Rollout, float]
"""A rollout with its prompt and advantage."""


class PlainPapo:
    def __init__(self, model: PreTrainedModel, sequences: int = 8):
        """`sequences`: number of rollouts in one forward pass."""
        self.model, self.device = model.train(), model.device
        self.sequences = sequences
        decayed = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}],
            lr=LEARNING_RATE,
            fused=self.device.type == "cuda",
        )
        self.start: dict[str, Tensor] = {}

    @classmethod
    def from_folder(cls, folder: Path, sequences: int = 8) -> PlainPapo:
        """In fp32; `folder`/model is the Hugging Face folder, whose weights `reset` brings back."""
        model = AutoModelForImageTextToText.from_pretrained(
            folder / "model", dtype=torch.float32, attn_implementation="sdpa", local_files_only=True,
            trust_remote_code=False, use_safetensors=True,
        )  # fmt: skip
        plain = cls(model, sequences)
        plain.start = {name: tensor.clone() for name, tensor in plain.model.state_dict().items()}
        return plain

    def update(self, kind: str, groups: Sequence[Group], old: dict[Key, Tensor] | None = None) -> tuple[float, float]:
        """One optimizer step; `kind` as in `ours.KINDS`. The loss and the norm of the gradient before clipping."""
        num_tokens = sum(len(rollout.response_ids) for group in groups for rollout in group.rollouts)
        total = 0.0
        with without_cuda_mode():
            for samples in batched(_samples(groups), self.sequences):
                loss = self._loss(kind, samples, old) / num_tokens
                loss.backward()
                total += float(loss.detach())
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return total, float(norm)

    def logprobs(self, groups: Sequence[Group], masked: bool = False) -> dict[Key, Tensor]:
        """Log-probs of the response tokens of every rollout, with the picture or with its masked view."""
        logprobs = {}
        with without_cuda_mode(), torch.no_grad():
            for samples in batched(_samples(groups), self.sequences):
                values, mask = self._response_logprobs(samples, masked)
                for (prompt, rollout, _), row, keep in zip(samples, values, mask):
                    logprobs[prompt.id, rollout.index] = row[keep.bool()]
        return logprobs

    def reset(self) -> None:
        """Loads the weights of the folder again."""
        self.model.load_state_dict(self.start)

    def _loss(self, kind: str, samples: Sequence[Sample], old: dict[Key, Tensor] | None) -> Tensor:
        """The loss, summed over the response tokens of `samples`."""
        masked_logprobs = None
        if kind == "PAPO frozen":
            with torch.no_grad():
                masked_logprobs, _ = self._response_logprobs(samples, masked=True)
        logprobs, mask = self._response_logprobs(samples, masked=False)
        if kind == "PAPO joint":
            masked_logprobs, _ = self._response_logprobs(samples, masked=True)
        old_logprobs = logprobs.detach()
        if old is not None:
            values, _ = pad_right([old[prompt.id, rollout.index] for prompt, rollout, _ in samples], 0)
            old_logprobs = values.to(self.device)
        advantages = torch.tensor([advantage for _, _, advantage in samples], device=self.device)[:, None]
        loss = policy_loss(logprobs, old_logprobs, advantages)
        if masked_logprobs is not None:
            loss = loss - PERCEPTION_COEF * k3(logprobs, masked_logprobs)
        return (loss * mask).sum()

    def _response_logprobs(self, samples: Sequence[Sample], masked: bool) -> tuple[Tensor, Tensor]:
        """[B, R] log-probs of the response tokens, padded on the right, and their mask."""
        config, prompts = self.model.config, [prompt for prompt, _, _ in samples]
        pad_id = config.text_config.pad_token_id
        prompt_ids, prompt_mask = pad_left([prompt.inputs.token_ids_S for prompt in prompts], pad_id)
        response_ids, mask = pad_right([torch.tensor(rollout.response_ids) for _, rollout, _ in samples], pad_id)
        input_ids = torch.cat([prompt_ids, response_ids], dim=1)
        pixel_values, image_grid_thw = image_inputs(prompts, masked)
        input_ids, response_ids, mask = (tensor.to(self.device) for tensor in (input_ids, response_ids, mask))
        logits = self.model(
            input_ids=input_ids,
            attention_mask=torch.cat([prompt_mask.to(self.device), mask], dim=1),
            pixel_values=pixel_values.to(self.device),
            image_grid_thw=image_grid_thw.to(self.device),
            mm_token_type_ids=(input_ids == config.image_token_id).long(),
            logits_to_keep=response_ids.shape[1] + 1,
            use_cache=False,
        ).logits[:, :-1]
        return logits.float().log_softmax(-1).gather(-1, response_ids[..., None])[..., 0], mask


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
    """PPO's clipped loss with the dual clip, for each token."""
    ratio = (logprobs - old_logprobs).clamp(-20, 20).exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH))
    return torch.where(advantages < 0, torch.minimum(loss, -advantages * DUAL_CLIP), loss)


def k3(logprobs: Tensor, masked_logprobs: Tensor) -> Tensor:
    """Schulman's estimate of KL(policy || masked policy), for each token."""
    gap = (masked_logprobs - logprobs).clamp(-20, 20)
    return (gap.exp() - gap - 1).clamp(-10, 10)


def _samples(groups: Sequence[Group]) -> list[Sample]:
    return [
        (group.prompt, rollout, advantage)
        for group in groups
        for rollout, advantage in zip(group.rollouts, group.advantages, strict=True)
    ]
