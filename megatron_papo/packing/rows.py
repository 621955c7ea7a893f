"""Makes packed rows (`MicroBatch`) of groups of rollouts: each prompt once, then the responses to it.

Positions are those of every rollout in a row of its own. Attention lets every response read its own prompt and itself,
and nothing else. A prompt with a single response in its row forms one segment with it. Suffixes are those of
`types.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_papo.config import LossConfig
from megatron_papo.packing.assignment import Cost, GroupPart, rows_of, split, whole
from megatron_papo.packing.loss_weights import Totals, rollout_weights
from megatron_papo.types import Batch, Group, MicroBatch, Prompt, Rollout, Segment

Positions = Callable[[Tensor, Tensor | None], Tensor]
"""(token ids [S], grids of images [I, 3] or None) -> [3, S] int64: positions of the tokens of a prompt in time, height
and width. Raises ValueError where image tokens and grids do not match."""


def pack(
    groups: Sequence[Group],
    *,
    tokens_per_micro_batch: int,
    loss: LossConfig,
    totals: Totals,
    joint: bool,
    positions: Positions,
    banned_ids: tuple[int, ...],
    cost: Cost,
    least_rows: int = 1,
    longest_row: int | None = None,
) -> Batch:
    """The groups' rollouts as rows of at most `tokens_per_micro_batch` tokens and about equal cost. A prompt whose
    longest response has no room in such a row has rows of its own, of at most `longest_row` tokens (None: no more).

    `totals` are global. With `joint` a prompt with an image and its responses count twice, for the masked copy that
    `joint_row` adds. `positions` is the function of the model's family. `banned_ids` must contain the image token.
    `least_rows`: the least number of rows, where there are so many pieces. Raises ValueError naming the prompt for a
    prompt and one response that are longer, a response that is empty or has a banned token, image tokens that do not
    match the grids, images without pixels, or without a masked view where others of the row have one.
    """
    for group in groups:
        _check(group, banned_ids, joint)
    budget = tokens_per_micro_batch
    pieces = [piece for group in groups for piece in split(whole(group, joint), budget, longest_row or budget)]
    rows = rows_of(pieces, [piece.cost(cost) for piece in pieces], budget, least_rows)
    return tuple(_row([pieces[index] for index in row], loss, totals, positions) for row in rows)


def supervised_group(prompt: Prompt, response_ids: tuple[int, ...], text: str = "") -> Group:
    """A demonstration as a group of one rollout, for `pack` and `sft_loss`."""
    rollout = Rollout(0, response_ids, (0.0,) * len(response_ids), text, "stop", policy_version=0)
    return Group(prompt, (rollout,), advantages=(0.0,))


def _check(group: Group, banned_ids: tuple[int, ...], joint: bool) -> None:
    prompt, banned = group.prompt, set(banned_ids)
    assert len(group.advantages) == len(group.rollouts), f"prompt {prompt.id} has no advantages yet"
    for rollout in group.rollouts:
        assert len(rollout.rollout_logprobs) == len(rollout.response_ids), "one rollout log-prob a response token"
        assert len(rollout.loss_mask) == len(rollout.response_ids), "one entry of `sampled` a response token"
        if not rollout.response_ids:
            raise ValueError(f"prompt {prompt.id}: rollout {rollout.index} has an empty response")
        if faults := sorted(banned.intersection(rollout.response_ids)):
            raise ValueError(f"prompt {prompt.id}: rollout {rollout.index} holds banned tokens {faults}")
    if prompt.has_image and prompt.inputs.pixel_values_PD is None:
        raise ValueError(f"prompt {prompt.id}: {prompt.num_images} images and 0 pixels")
    if joint and prompt.has_image and prompt.masked_pixel_values_PD is None:
        raise ValueError(
            f"prompt {prompt.id}: {prompt.num_images} images and 0 masked ones: a row of both views needs each"
        )


def _row(pieces: Sequence[GroupPart], loss: LossConfig, totals: Totals, positions: Positions) -> MicroBatch:
    parts = _Parts(pieces, positions)
    rollouts = [(piece.group, index) for piece in pieces for index in piece.rollouts]
    weights = [rollout_weights(group, index, loss, totals) for group, index in rollouts]
    lengths = [len(group.rollouts[index].response_ids) for group, index in rollouts]
    targets = [token_id for group, index in rollouts for token_id in group.rollouts[index].response_ids]
    loss_mask_R = torch.tensor([read for group, index in rollouts for read in group.rollouts[index].loss_mask])
    logprobs = [value for group, index in rollouts for value in group.rollouts[index].rollout_logprobs]
    return MicroBatch(
        token_ids_T=torch.cat(parts.tokens),
        position_ids_3T=torch.cat(parts.positions, dim=1),
        segments=tuple(parts.segments),
        target_ids_R=torch.tensor(targets),
        logit_index_R=torch.cat(parts.logit_index),
        rollout_index_R=torch.arange(len(rollouts)).repeat_interleave(torch.tensor(lengths)),
        loss_mask_R=loss_mask_R,
        has_image_R=_spread([float(group.prompt.has_image) for group, _ in rollouts], lengths).bool(),
        weights_R=_spread([weight for weight, _ in weights], lengths) * loss_mask_R,
        perception_weights_R=_spread([weight for _, weight in weights], lengths) * loss_mask_R,
        advantages_R=_spread([group.advantages[index] for group, index in rollouts], lengths),
        rollout_logprobs_R=torch.tensor(logprobs, dtype=torch.float32),
        sequences=tuple((group.prompt.id, group.rollouts[index].index) for group, index in rollouts),
        **_pixels([piece.group.prompt for piece in pieces if piece.group.prompt.has_image]),
    )


class _Parts:
    """Tokens, positions and segments of a row, laid end to end."""

    def __init__(self, pieces: Sequence[GroupPart], positions: Positions):
        self.tokens: list[Tensor] = []
        self.positions: list[Tensor] = []
        self.segments: list[Segment] = []
        self.logit_index: list[Tensor] = []
        """For each rollout, the places that predict its tokens, each one place before the token; [tokens of the
        rollout]."""
        self._num_tokens = 0
        for piece in pieces:
            self._add(piece, _prompt_positions(piece.group.prompt, positions))

    def _add(self, piece: GroupPart, positions_3S: Tensor) -> None:
        prompt, parent = piece.group.prompt, len(self.segments)
        shared = len(piece.rollouts) > 1
        self._lay(prompt.inputs.token_ids_S, positions_3S)
        prompt_end, next_position = self._num_tokens, int(positions_3S.max()) + 1
        if shared:
            self.segments.append(Segment(prompt.inputs.token_ids_S.numel(), num_images=prompt.num_images))
        for index in piece.rollouts:
            ids_R = torch.tensor(piece.group.rollouts[index].response_ids)
            start, length = self._num_tokens, ids_R.numel()
            self._lay(ids_R, torch.arange(next_position, next_position + length).expand(3, -1))
            self.logit_index.append(
                torch.cat([torch.tensor([prompt_end - 1]), torch.arange(start, start + length - 1)])
            )
            if shared:
                self.segments.append(Segment(length, parent))
            else:
                self.segments.append(Segment(prompt.inputs.token_ids_S.numel() + length, num_images=prompt.num_images))

    def _lay(self, token_ids: Tensor, positions_3S: Tensor) -> None:
        self.tokens.append(token_ids)
        self.positions.append(positions_3S)
        self._num_tokens += token_ids.numel()


def _prompt_positions(prompt: Prompt, positions: Positions) -> Tensor:
    try:
        return positions(prompt.inputs.token_ids_S, prompt.inputs.grid_thw_I3)
    except ValueError as error:
        raise ValueError(f"prompt {prompt.id}: {error}") from None


def _spread(values: Sequence[float], lengths: Sequence[int]) -> Tensor:
    """Each rollout's value repeated for each of its response tokens, [R] float32."""
    return torch.tensor(values, dtype=torch.float32).repeat_interleave(torch.tensor(lengths))


def _pixels(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """The fields with the images of a row, in order of appearance, and their masked views where the prompts have them.
    They are references and not copies, since all rows of a step are in memory at once."""
    grids = [grid_I3 for prompt in prompts if (grid_I3 := prompt.inputs.grid_thw_I3) is not None]
    views = tuple(_masked_views(prompts))
    return {
        "pixel_values": tuple(prompt.inputs.pixel_values_PD for prompt in prompts),
        "grid_thw_I3": torch.cat(grids) if grids else None,
        "masked_pixel_values": views,
    }


def _masked_views(prompts: Sequence[Prompt]) -> Iterator[Tensor]:
    unmasked = [prompt.id for prompt in prompts if prompt.masked_pixel_values_PD is None]
    if unmasked and len(unmasked) < len(prompts):
        raise ValueError(f"prompts {unmasked} have no masked view, others of the row have one")
    for prompt in prompts:
        if prompt.masked_pixel_values_PD is not None:
            yield prompt.masked_pixel_values_PD
