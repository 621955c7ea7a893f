"""Rows to trace an update with: prompts that are mostly one square picture, and responses, of given lengths."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_papo.config import LossConfig
from megatron_papo.costs.activations import RowSize
from megatron_papo.model.positions import positions_of
from megatron_papo.model.shape import ModelShape
from megatron_papo.packing import joint_row, pack, token_totals
from megatron_papo.types import Batch, Group, ModelInputs, Prompt, Rollout

_WORD = 5
"""The token id of all text: any id that is not banned."""


@dataclass(frozen=True)
class Work:
    """One prompt a row, with its responses."""

    image_edge: int
    """Image tokens along an edge of the prompt's picture."""
    text_tokens: int
    response_tokens: int
    group_size: int
    num_rows: int = 1
    joint: bool = False
    """Both views in a row."""

    @property
    def prompt_tokens(self) -> int:
        return self.image_edge**2 + self.text_tokens

    @property
    def row_tokens(self) -> int:
        return (1 + self.joint) * (self.prompt_tokens + self.group_size * self.response_tokens)

    def row_size(self, shape: ModelShape) -> RowSize:
        patches, responses = self.image_edge**2 * shape.vision.merge_unit, self.group_size * self.response_tokens
        return RowSize(self.row_tokens, (1 + self.joint) * patches, (1 + self.joint) * responses)


def make_rows(work: Work, shape: ModelShape) -> Batch:
    """The rows of one update, with a masked view of every picture."""
    groups = [_group(work, shape, place) for place in range(work.num_rows)]
    rows = pack(
        groups,
        tokens_per_micro_batch=work.row_tokens,
        loss=LossConfig(),
        totals=token_totals(groups),
        joint=work.joint,
        cost=lambda prompt, responses, grids: prompt + sum(responses),
        positions=positions_of(shape),
        banned_ids=shape.vision_token_ids,
    )
    assert len(rows) == work.num_rows
    return tuple(joint_row(row) for row in rows) if work.joint else rows


def _group(work: Work, shape: ModelShape, place: int) -> Group:
    edge = work.image_edge * shape.vision.spatial_merge_size
    ids = [_WORD] + [shape.image_token_id] * work.image_edge**2 + [_WORD] * (work.text_tokens - 1)
    pixels = torch.zeros(edge * edge, shape.vision.patch_dim)
    inputs = ModelInputs(torch.tensor(ids), pixels, torch.tensor([[1, edge, edge]]))
    prompt = Prompt(f"traced:{place}", place, "", "", (), inputs, masked_pixel_values_PD=pixels)
    response = (_WORD,) * work.response_tokens
    rollouts = tuple(
        Rollout(index, response, (-1.0,) * work.response_tokens, "", "length", policy_version=0)
        for index in range(work.group_size)
    )
    return Group(prompt, rollouts, advantages=tuple(1.0 - 2 * (index % 2) for index in range(work.group_size)))
