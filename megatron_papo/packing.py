"""Groups of rollouts → packed rows (`MicroBatch`) under a token budget, with M-RoPE positions and loss weights.

One sequence (prompt and response) a rollout. Each token's weight is its share in the global mean, so the totals of
all data-parallel ranks (`token_totals`, all-reduced by the caller) come before packing, and neither the budget nor
the layout changes the gradient. Leaves out rows in which rollouts share their prompt's tokens.
Suffixes as in `types.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_papo.config import LossConfig
from megatron_papo.types import Batch, Group, MicroBatch, Prompt, Rollout, Segment


@dataclass(frozen=True)
class Totals:
    """What the means divide by; `sum_totals` adds them up over data-parallel ranks."""

    num_sequences: float = 0.0
    num_tokens: float = 0.0
    """Response tokens."""
    num_image_sequences: float = 0.0
    """The same two over sequences whose prompt has an image."""
    num_image_tokens: float = 0.0


def sum_totals(totals: Iterable[Totals]) -> Totals:
    """Of several ranks, or of several lists of groups."""
    return Totals(*(sum(column) for column in zip(*map(astuple, totals))))


def token_totals(groups: Sequence[Group]) -> Totals:
    """Of these groups alone."""
    return sum_totals(_group_totals(group) for group in groups)


@dataclass(frozen=True)
class _Sequence:
    """One rollout with its prompt; the two weights are those of each of its response tokens."""

    prompt: Prompt
    rollout: Rollout
    advantage: float
    weight: float
    perception_weight: float

    @property
    def num_tokens(self) -> int:
        return self.prompt.inputs.token_ids_S.numel() + len(self.rollout.response_ids)


def pack(
    groups: Sequence[Group],
    *,
    tokens_per_micro_batch: int,
    loss: LossConfig,
    totals: Totals,
    joint: bool,
    image_token_id: int,
    merge_size: int,
    banned_ids: tuple[int, ...] = (),
) -> Batch:
    """The groups' rollouts as rows of at most `tokens_per_micro_batch` tokens, first fit, longest first.

    `totals` are global. With `joint` a sequence with an image counts twice, for the masked copy `joint_row` adds.
    Raises ValueError naming the prompt: a sequence over the budget, a response that is empty or holds a banned token
    (the image token always is), image tokens that do not match the grids, an image without its masked view beside
    others with one.
    """
    sequences = [_weighted(group, index, loss, totals) for group in groups for index in range(len(group.rollouts))]
    for sequence in sequences:
        _check_response(sequence, (image_token_id, *banned_ids))
    costs = [sequence.num_tokens * (2 if joint and _has_image(sequence.prompt) else 1) for sequence in sequences]
    for sequence, cost in zip(sequences, costs):
        if cost > tokens_per_micro_batch:
            raise ValueError(
                f"prompt {sequence.prompt.id}: a sequence of {cost} tokens{' (two views)' if joint else ''} does not "
                f"fit train.tokens_per_micro_batch={tokens_per_micro_batch}"
            )
    rows = _first_fit(costs, tokens_per_micro_batch)
    return tuple(_row([sequences[index] for index in row], image_token_id, merge_size) for row in rows)


def supervised_group(prompt: Prompt, response_ids: tuple[int, ...], text: str = "") -> Group:
    """A demonstration as a group of one rollout, for `pack` and `losses.sft_loss`."""
    rollout = Rollout(0, response_ids, (0.0,) * len(response_ids), text, "stop", policy_version=0)
    return Group(prompt, (rollout,), advantages=(0.0,))


def mrope_positions(token_ids_S: Tensor, grid_thw_I3: Tensor | None, *, image_token_id: int, merge_size: int) -> Tensor:
    """[3, S] int64 positions (time, height, width) of a sequence with still images, as Qwen2.5-VL counts them.

    A text token advances all three by one; an image spans its merged grid from the next position on, and the text
    after it goes on past the grid's larger edge. Raises ValueError, with the counts, when runs of image tokens and
    grids differ.
    """
    grids = [] if grid_thw_I3 is None else grid_thw_I3.tolist()
    sizes = [time * height * width // merge_size**2 for time, height, width in grids]
    is_image_S = token_ids_S == image_token_id
    if int(is_image_S.sum()) != sum(sizes):
        raise ValueError(f"{int(is_image_S.sum())} image tokens for {len(grids)} images of {sizes} tokens")
    parts: list[Tensor] = []
    place = position = 0
    image_places = is_image_S.nonzero()[:, 0].tolist()
    for index, ((time, height, width), size) in enumerate(zip(grids, sizes)):
        first = image_places[sum(sizes[:index])]
        if time != 1 or not is_image_S[first : first + size].all():
            raise ValueError(f"image {index} of grid {(time, height, width)} is not one run of {size} image tokens")
        text = first - place
        parts += [_text_positions(position, text), _grid_positions(position + text, height, width, merge_size)]
        place, position = first + size, position + text + max(height, width) // merge_size
    parts.append(_text_positions(position, token_ids_S.numel() - place))
    return torch.cat(parts, dim=1)


def _text_positions(start: int, length: int) -> Tensor:
    return torch.arange(start, start + length).expand(3, -1)


def _grid_positions(start: int, height: int, width: int, merge_size: int) -> Tensor:
    rows, columns = height // merge_size, width // merge_size
    times = torch.zeros(rows * columns, dtype=torch.int64)
    return start + torch.stack(
        [times, torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)]
    )


def masked_row(row: MicroBatch) -> MicroBatch:
    """The same row with the masked images: what a frozen masked branch scores."""
    if not row.pixel_values:
        return row
    assert row.masked_pixel_values, "the prompts of this row were not masked"
    return replace(row, pixel_values=row.masked_pixel_values)


def joint_row(row: MicroBatch) -> MicroBatch:
    """The row followed by a copy, with masked images, of each of its sequences that has an image.

    Response tokens without an image find their masked view in the original, where the perception KL is 0.
    """
    if not row.pixel_values:
        return replace(row, masked_logit_index_R=row.logit_index_R)
    assert row.masked_pixel_values, "the prompts of this row were not masked"
    assert row.grid_thw_I3 is not None
    spans = list(torch.arange(row.num_tokens).split(row.segment_lengths))
    copied = sorted(set(row.rollout_index_R[row.has_image_R].tolist()))
    places_C = torch.cat([spans[index] for index in copied]).to(row.token_ids_T.device)
    moved_T = torch.arange(row.num_tokens, device=places_C.device)
    moved_T[places_C] = row.num_tokens + torch.arange(places_C.numel(), device=places_C.device)
    return replace(
        row,
        token_ids_T=torch.cat([row.token_ids_T, row.token_ids_T[places_C]]),
        position_ids_3T=torch.cat([row.position_ids_3T, row.position_ids_3T[:, places_C]], dim=1),
        segments=(*row.segments, *(row.segments[index] for index in copied)),
        pixel_values=row.pixel_values + row.masked_pixel_values,
        grid_thw_I3=row.grid_thw_I3.repeat(2, 1),
        masked_pixel_values=(),
        masked_logit_index_R=moved_T[row.logit_index_R],
    )


def empty_like(row: MicroBatch) -> MicroBatch:
    """The same row with no token that counts, for a rank that takes part in an update without data of its own."""
    return replace(
        row,
        loss_mask_R=torch.zeros_like(row.loss_mask_R),
        weights_R=torch.zeros_like(row.weights_R),
        perception_weights_R=torch.zeros_like(row.perception_weights_R),
    )


def _has_image(prompt: Prompt) -> bool:
    return prompt.inputs.pixel_values_PD is not None


def _num_images(prompt: Prompt) -> int:
    return 0 if prompt.inputs.grid_thw_I3 is None else len(prompt.inputs.grid_thw_I3)


def _group_totals(group: Group) -> Totals:
    num_sequences, num_tokens = len(group.rollouts), sum(len(rollout.response_ids) for rollout in group.rollouts)
    image = _has_image(group.prompt)
    return Totals(num_sequences, num_tokens, num_sequences * image, num_tokens * image)


def _weighted(group: Group, index: int, loss: LossConfig, totals: Totals) -> _Sequence:
    assert len(group.advantages) == len(group.rollouts), f"prompt {group.prompt.id} has no advantages yet"
    length = len(group.rollouts[index].response_ids)
    weight = _weight(length, loss, totals.num_sequences, totals.num_tokens)
    image = _has_image(group.prompt)
    perception = _weight(length, loss, totals.num_image_sequences, totals.num_image_tokens) if image else 0.0
    return _Sequence(group.prompt, group.rollouts[index], group.advantages[index], weight, perception)


def _weight(length: int, loss: LossConfig, num_sequences: float, num_tokens: float) -> float:
    if loss.averaging == "token":
        return 1.0 / num_tokens
    if loss.averaging == "sequence":
        return 1.0 / (num_sequences * max(length, 1))
    assert loss.fixed_denominator is not None
    return 1.0 / loss.fixed_denominator


def _check_response(sequence: _Sequence, banned_ids: tuple[int, ...]) -> None:
    if not sequence.rollout.response_ids:
        raise ValueError(f"prompt {sequence.prompt.id}: rollout {sequence.rollout.index} has an empty response")
    found = sorted(set(sequence.rollout.response_ids) & set(banned_ids))
    if found:
        raise ValueError(f"prompt {sequence.prompt.id}: rollout {sequence.rollout.index} holds banned tokens {found}")


def _first_fit(costs: Sequence[int], budget: int) -> list[list[int]]:
    """Indices by row: longest first, each into the first row with room; within a row in the original order."""
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        fits = next((row for row, left in enumerate(room) if left >= costs[index]), None)
        if fits is None:
            fits = len(rows)
            rows.append([])
            room.append(budget)
        rows[fits].append(index)
        room[fits] -= costs[index]
    return [sorted(row) for row in rows]


def _row(sequences: Sequence[_Sequence], image_token_id: int, merge_size: int) -> MicroBatch:
    tokens, positions, logit_index, offset = [], [], [], 0
    for sequence in sequences:
        inputs = sequence.prompt.inputs
        ids_S = torch.cat([inputs.token_ids_S, torch.tensor(sequence.rollout.response_ids)])
        tokens.append(ids_S)
        try:
            positions.append(
                mrope_positions(ids_S, inputs.grid_thw_I3, image_token_id=image_token_id, merge_size=merge_size)
            )
        except ValueError as error:
            raise ValueError(f"prompt {sequence.prompt.id}: {error}") from None
        first = offset + inputs.token_ids_S.numel() - 1  # a token is predicted one place before its own
        logit_index.append(torch.arange(first, first + len(sequence.rollout.response_ids)))
        offset += ids_S.numel()
    lengths = [len(sequence.rollout.response_ids) for sequence in sequences]
    perception_weights_R = _spread([sequence.perception_weight for sequence in sequences], lengths)
    rollout_logprobs = [value for sequence in sequences for value in sequence.rollout.rollout_logprobs]
    assert len(rollout_logprobs) == sum(lengths), "one rollout log-prob a response token"
    return MicroBatch(
        token_ids_T=torch.cat(tokens),
        position_ids_3T=torch.cat(positions, dim=1),
        segments=tuple(
            Segment(ids_S.numel(), num_images=_num_images(sequence.prompt))
            for sequence, ids_S in zip(sequences, tokens)
        ),
        target_ids_R=torch.tensor([word for sequence in sequences for word in sequence.rollout.response_ids]),
        logit_index_R=torch.cat(logit_index),
        rollout_index_R=torch.arange(len(sequences)).repeat_interleave(torch.tensor(lengths)),
        loss_mask_R=torch.ones(sum(lengths), dtype=torch.bool),
        has_image_R=_spread([float(_has_image(sequence.prompt)) for sequence in sequences], lengths).bool(),
        weights_R=_spread([sequence.weight for sequence in sequences], lengths),
        perception_weights_R=perception_weights_R,
        advantages_R=_spread([sequence.advantage for sequence in sequences], lengths),
        rollout_logprobs_R=torch.tensor(rollout_logprobs, dtype=torch.float32),
        sequences=tuple((sequence.prompt.id, sequence.rollout.index) for sequence in sequences),
        **_pixels([sequence.prompt for sequence in sequences if _has_image(sequence.prompt)]),
    )


def _spread(values: Sequence[float], lengths: Sequence[int]) -> Tensor:
    """[R] float32: each sequence's value for each of its response tokens."""
    return torch.tensor(values, dtype=torch.float32).repeat_interleave(torch.tensor(lengths))


def _pixels(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """The images of a row in order of appearance, and their masked views when the prompts have them.

    References, not copies: a step holds its rows all at once, each prompt's pixels in as many as it has rollouts.
    """
    inputs = [prompt.inputs for prompt in prompts]
    pixels = [values_PD for one in inputs if (values_PD := one.pixel_values_PD) is not None]
    grids = [grid_I3 for one in inputs if (grid_I3 := one.grid_thw_I3) is not None]
    assert len(pixels) == len(grids) == len(prompts)
    masked = [prompt.masked_pixel_values_PD for prompt in prompts]
    views = [view_PD for view_PD in masked if view_PD is not None]
    if views and len(views) < len(prompts):
        unmasked = [prompt.id for prompt, view in zip(prompts, masked) if view is None]
        raise ValueError(f"prompts {unmasked} have no masked view, others of the row have one")
    return {
        "pixel_values": tuple(pixels),
        "grid_thw_I3": torch.cat(grids) if grids else None,
        "masked_pixel_values": tuple(views),
    }
