"""The two views of a row: with the images as they are, and with masked images."""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_papo.types import MicroBatch, Segment


def masked_row(row: MicroBatch) -> MicroBatch:
    """The same row with the masked images, which a frozen masked branch scores."""
    if not row.pixel_values:
        return row
    assert row.masked_pixel_values, "the prompts of this row were not masked"
    return replace(row, pixel_values=row.masked_pixel_values)


def joint_row(row: MicroBatch) -> MicroBatch:
    """The row followed by a copy, with masked images, of each prompt that has an image and of the responses to it.

    Response tokens without an image have the original as their masked view, and so a perception KL of 0.
    """
    if not row.pixel_values:
        return replace(row, masked_logit_index_R=row.logit_index_R)
    assert row.masked_pixel_values, "the prompts of this row were not masked"
    assert row.grid_thw_I3 is not None
    copied = [index for index, segment in enumerate(row.segments) if _has_image(row, segment)]
    spans = torch.arange(row.num_tokens).split(row.segment_lengths)
    places_C = torch.cat([spans[index] for index in copied]).to(row.token_ids_T.device)
    moved_T = torch.arange(row.num_tokens, device=places_C.device)
    moved_T[places_C] = row.num_tokens + torch.arange(places_C.numel(), device=places_C.device)
    moved = {index: len(row.segments) + place for place, index in enumerate(copied)}
    copies = [row.segments[index] for index in copied]
    copies = [s if s.parent is None else s._replace(parent=moved[s.parent]) for s in copies]
    return replace(
        row,
        token_ids_T=torch.cat([row.token_ids_T, row.token_ids_T[places_C]]),
        position_ids_3T=torch.cat([row.position_ids_3T, row.position_ids_3T[:, places_C]], dim=1),
        segments=(*row.segments, *copies),
        pixel_values=row.pixel_values + row.masked_pixel_values,
        grid_thw_I3=row.grid_thw_I3.repeat(2, 1),
        masked_pixel_values=(),
        masked_logit_index_R=moved_T[row.logit_index_R],
    )


def _has_image(row: MicroBatch, segment: Segment) -> bool:
    prompt = segment if segment.parent is None else row.segments[segment.parent]
    return prompt.num_images > 0


def empty_like(row: MicroBatch) -> MicroBatch:
    """The same row with all loss weights zero, for a rank that takes part in an update without data of its own."""
    return replace(
        row,
        loss_mask_R=torch.zeros_like(row.loss_mask_R),
        weights_R=torch.zeros_like(row.weights_R),
        perception_weights_R=torch.zeros_like(row.perception_weights_R),
        rollout_logprobs_R=torch.zeros_like(row.rollout_logprobs_R),  # a NaN would spoil a sum even at weight 0
    )
