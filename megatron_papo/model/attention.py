"""Attention within the sequences of a packed row, for the language model and the vision tower.

A row [T, 1, H] holds sequences laid end to end. Each attends to itself alone: causally (language) or in full (a
vision window, a frame). Sequences of similar length are gathered into one right-padded batch, so that torch's SDPA
kernels run on a few batches and no T x T mask ever exists. Causal batches may be padded, since a place never sees
those to its right; batches of full attention hold equal lengths only. The places are computed once a micro-batch and
shared by all layers. A sequence with a parent (a prompt shared by its rollouts) would add key places to its batch;
it is not built yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_LEAST_FILL = 0.75
"""A causal sequence joins a batch when it fills at least this share of the batch's length."""
_SHORT = 256
"""Up to this length SDPA's own grouped-query path (which may write out the scores) beats copying keys and values."""


@dataclass(frozen=True)
class Segments:
    """How a row of T places splits into sequences, as padded batches that together have N >= T places."""

    qkv_format: ClassVar[str] = "row"
    """Megatron asks whether this is "thd"; no: rotary angles are given for every place of the row."""
    causal: bool
    batches: tuple[tuple[int, int], ...]
    """(sequences, padded length) of each batch."""
    gather_index_N: Tensor | None
    """Row place of every padded place; None when the row already lies as the batches do."""
    return_index_T: Tensor | None
    """Padded place of every row place."""

    def of_layer(self, layer: int) -> Segments:
        """What layer `layer` (from 0) attends within."""
        del layer
        return self


@dataclass(frozen=True)
class WindowedSegments:
    """The vision tower's: most layers attend within windows, some over whole frames."""

    qkv_format: ClassVar[str] = "row"
    windows: Segments
    frames: Segments
    frame_layers: frozenset[int]

    def of_layer(self, layer: int) -> Segments:
        return self.frames if layer in self.frame_layers else self.windows


def build_segments(lengths: Sequence[int], *, causal: bool, device: torch.device) -> Segments:
    """Groups the sequences of a row, given their lengths (each at least 1) in row order."""
    lengths_of = np.asarray(lengths, dtype=np.int64)
    assert lengths_of.size and lengths_of.min() > 0, "a row is made of sequences of at least one token"
    starts = np.concatenate([[0], lengths_of.cumsum()[:-1]])
    least_fill = _LEAST_FILL if causal else 1.0
    batches, places, returns, padded_so_far = [], [], np.empty(lengths_of.sum(), dtype=np.int64), 0
    for members in _groups(lengths_of, least_fill):
        own, longest = lengths_of[members][:, None], int(lengths_of[members].max())
        step = np.arange(longest)[None, :]
        place = starts[members][:, None] + np.minimum(step, own - 1)  # padding repeats the last token
        real = step < own
        returns[place[real]] = padded_so_far + np.flatnonzero(real)
        batches.append((len(members), longest))
        places.append(place.reshape(-1))
        padded_so_far += place.size
    gather = np.concatenate(places)
    if np.array_equal(gather, np.arange(len(returns))):
        return Segments(causal, tuple(batches), None, None)
    return Segments(causal, tuple(batches), torch.from_numpy(gather).to(device), torch.from_numpy(returns).to(device))


def _groups(lengths: np.ndarray, least_fill: float) -> list[np.ndarray]:
    """Members of each batch, longest batch first; equal lengths keep their order in the row."""
    order = np.argsort(-lengths, kind="stable")
    groups, begin = [], 0
    for place in range(1, len(order) + 1):
        if place == len(order) or lengths[order[place]] < least_fill * lengths[order[begin]]:
            groups.append(order[begin:place])
            begin = place
    return [np.sort(group) for group in groups]


class StructuredAttention(torch.nn.Module):
    """Megatron core attention over a packed row; the structure comes in as `packed_seq_params`."""

    def __init__(self, config: Any, layer_number: int, *_: Any, softmax_scale: float | None = None, **__: Any):
        super().__init__()
        assert config.attention_dropout == 0.0
        self.layer = layer_number - 1  # Megatron counts from 1
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query_T1ND: Tensor,
        key_T1GD: Tensor,
        value_T1GD: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: Segments | WindowedSegments,
        **_: Any,
    ) -> Tensor:
        """[T, 1, heads, D] queries and [T, 1, key-value heads, D] keys and values to [T, 1, heads * D]."""
        assert attention_mask is None, "the structure of a row is in packed_seq_params"
        segments = packed_seq_params.of_layer(self.layer)
        query, key, value = (_to_batches(tensor.squeeze(1), segments) for tensor in (query_T1ND, key_T1GD, value_T1GD))
        found, begin = [], 0
        for num, length in segments.batches:
            end = begin + num * length
            batch = (tensor[begin:end].unflatten(0, (num, length)).transpose(1, 2) for tensor in (query, key, value))
            attended = _attend(*batch, causal=segments.causal, scale=self.softmax_scale)
            found.append(attended.transpose(1, 2).reshape(num * length, -1))
            begin = end
        return _to_row(found[0] if len(found) == 1 else torch.cat(found), segments).unsqueeze(1)


def _attend(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float | None) -> Tensor:
    """SDPA on [B, heads, L, D]; keys and values may have fewer heads."""
    copies = query.shape[1] // key.shape[1]
    grouped = copies > 1 and (query.shape[2] <= _SHORT or (query.is_cuda and query.dtype != torch.float32))
    if copies > 1 and not grouped:
        key, value = (tensor.repeat_interleave(copies, dim=1) for tensor in (key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scale, enable_gqa=grouped)


def _to_batches(row: Tensor, segments: Segments) -> Tensor:
    if segments.gather_index_N is None:
        return row
    return _ToBatches.apply(row, segments.gather_index_N, segments.return_index_T)


def _to_row(padded: Tensor, segments: Segments) -> Tensor:
    if segments.return_index_T is None:
        return padded
    return _ToRow.apply(padded, segments.return_index_T)


class _ToBatches(torch.autograd.Function):
    """Row to padded batches. Padding gets no gradient, so the way back is a plain gather, unlike index_select's."""

    @staticmethod
    def forward(ctx: Any, row: Tensor, gather_index: Tensor, return_index: Tensor) -> Tensor:
        ctx.save_for_backward(return_index)
        return row.index_select(0, gather_index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class _ToRow(torch.autograd.Function):
    """Padded batches to row; the gradient of padding is exactly zero."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, return_index: Tensor) -> Tensor:
        ctx.save_for_backward(return_index)
        ctx.num_places = padded.shape[0]
        return padded.index_select(0, return_index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        whole = grad.new_zeros((ctx.num_places, *grad.shape[1:]))
        return whole.index_copy_(0, ctx.saved_tensors[0], grad), None
