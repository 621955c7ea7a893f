"""Attention within a packed row: shared prompts, plain sequences and the windows of the vision tower.

A row [T, 1, H] holds segments laid end to end. Each attends to itself, causally (language) or in full (a vision window,
a frame), and a response also to all of the prompt that it shares with others. Two kinds of block make that up, and no
T x T mask ever exists: segments of similar length gathered into one right-padded batch, and the responses of a prompt
against the prompt's keys. Padded places lie to the right of all real ones, which causal attention never sees; batches
of full attention hold equal lengths only. The blocks are laid out once a micro-batch and shared by all layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_papo.model.attention_kernels import attend, attend_backward, merge
from megatron_papo.model.attention_varlen import VarlenPlan, varlen_attend, varlen_attend_backward
from megatron_papo.types import Segment

_MOST_PADDING = 0.05
"""Padded places of a row's batches, as a share of its tokens."""
_FILLS = (0.5, 0.7, 0.8, 0.9, 0.95, 1.0)
"""A segment joins a batch when it fills at least this share of its length: the first that pads little enough."""

Places = slice | Tensor


@dataclass(frozen=True)
class Block:
    """Segments of about one length, [sequences, length] places of the row, each attending to itself."""

    size: tuple[int, int]
    places: Places
    """Of every padded place, the place in the row; padding repeats the segment's last token."""
    padded: Tensor | None
    """Which of them are padding, [sequences * length] bool; None when none is."""


@dataclass(frozen=True)
class Segments:
    """How the T places of a row attend to each other."""

    qkv_format: ClassVar[str] = "row"
    """Megatron asks whether this is "thd"; no: rotary angles are given for every place of the row."""
    causal: bool
    blocks: tuple[Block, ...]
    """Every place of the row is in one."""
    prefixes: tuple[tuple[slice, slice], ...]
    """(places of responses, places of the prompt that they all see)."""
    varlen: VarlenPlan | None
    """The same for variable-length kernels, on a GPU."""

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


def build_segments(segments: Sequence[Segment], *, causal: bool, device: torch.device) -> Segments:
    """Lays out the blocks of a row, given its segments (of at least one token each) in row order."""
    lengths = np.asarray([segment.length for segment in segments], dtype=np.int64)
    assert lengths.size and lengths.min() > 0, "a row is made of segments of at least one token"
    starts = np.concatenate([[0], lengths.cumsum()[:-1]])
    prefixes = tuple(_prefixes(segments, starts))
    assert causal or not prefixes
    blocks = tuple(_block(starts[members], lengths[members], device) for members in _batches(lengths, causal))
    varlen = VarlenPlan.of(lengths.tolist(), prefixes, causal, device) if device.type == "cuda" else None
    return Segments(causal, blocks, prefixes, varlen)


def _prefixes(segments: Sequence[Segment], starts: np.ndarray) -> Iterator[tuple[slice, slice]]:
    """One for every run of segments that follow one another and share a parent."""
    for index, (segment, start) in enumerate(zip(segments, starts.tolist())):
        parent = segment.parent
        if parent is None or (index and segments[index - 1].parent == parent):
            continue
        assert segments[parent].parent is None and parent < index, "a prompt comes before its responses"
        end = start
        for follower in segments[index:]:
            if follower.parent != parent:
                break
            end += follower.length
        key_start = int(starts[parent])
        yield slice(start, end), slice(key_start, key_start + segments[parent].length)


def _batches(lengths: np.ndarray, causal: bool) -> list[np.ndarray]:
    """Members of each batch: as few batches as the bound on padding allows."""
    for fill in _FILLS if causal else (1.0,):
        groups = _groups(lengths, fill)
        padding = sum(int(lengths[group].max()) * len(group) for group in groups) - int(lengths.sum())
        if padding <= _MOST_PADDING * lengths.sum():
            return groups
    raise AssertionError("equal lengths need no padding")


def _groups(lengths: np.ndarray, fill: float) -> list[np.ndarray]:
    """Longest batch first; a batch's members in the order of the row."""
    order = np.argsort(-lengths, kind="stable")
    groups, begin = [], 0
    for place in range(1, len(order) + 1):
        if place == len(order) or lengths[order[place]] < fill * lengths[order[begin]]:
            groups.append(np.sort(order[begin:place]))
            begin = place
    return groups


def _block(starts: np.ndarray, lengths: np.ndarray, device: torch.device) -> Block:
    longest = int(lengths.max())
    step = np.arange(longest)
    places = (starts[:, None] + np.minimum(step, lengths[:, None] - 1)).reshape(-1)
    padded = (step >= lengths[:, None]).reshape(-1)
    size, first = (len(lengths), longest), int(starts[0])
    if np.array_equal(places, np.arange(first, first + places.size)):
        return Block(size, slice(first, first + places.size), None)
    return Block(
        size,
        torch.from_numpy(places).to(device),
        torch.from_numpy(padded).to(device) if padded.any() else None,
    )


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
        scale = self.softmax_scale or query_T1ND.shape[-1] ** -0.5
        row = (tensor.squeeze(1) for tensor in (query_T1ND, key_T1GD, value_T1GD))
        out_TND = _RowAttention.apply(*row, packed_seq_params.of_layer(self.layer), scale)
        return out_TND.flatten(1).unsqueeze(1)


class _RowAttention(torch.autograd.Function):
    """Keeps queries, keys, values, output and log-sum-exp of the row; copies of blocks are made again in backward."""

    @staticmethod
    def forward(ctx: Any, q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor, segments: Segments, scale: float) -> Tensor:
        plan = _varlen_plan(q_TND, segments)
        if plan is not None:
            out_TND, lse = varlen_attend(q_TND, k_TGD, v_TGD, plan, scale)
        else:
            out_TND, lse = _attend_blocks(q_TND, k_TGD, v_TGD, segments, scale)
        ctx.save_for_backward(q_TND, k_TGD, v_TGD, out_TND, lse)
        ctx.segments, ctx.scale = segments, scale
        return out_TND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TND: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q_TND, k_TGD, v_TGD, out_TND, lse = ctx.saved_tensors
        plan = _varlen_plan(q_TND, ctx.segments)
        if plan is not None:
            grads = varlen_attend_backward(grad_TND, q_TND, k_TGD, v_TGD, out_TND, lse, plan, ctx.scale)
        else:
            grads = _attend_blocks_backward(grad_TND, q_TND, k_TGD, v_TGD, out_TND, lse, ctx.segments, ctx.scale)
        return *grads, None, None


def _varlen_plan(query: Tensor, segments: Segments) -> VarlenPlan | None:
    """Variable-length kernels are there in half precision alone."""
    return segments.varlen if query.dtype in (torch.bfloat16, torch.float16) else None


def _attend_blocks(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> tuple[Tensor, Tensor]:
    """Output [T, N, D] and log-sum-exp [T, N]."""
    out_TND = torch.empty_like(q)
    lse_TN = q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
    for block in segments.blocks:
        found, lse = attend(*(_taken(tensor, block) for tensor in (q, k, v)), causal=segments.causal, scale=scale)
        _put(out_TND, block, found)
        _put(lse_TN, block, lse)
    for queries, keys in segments.prefixes:
        found, lse = attend(
            *(_span(t, part) for t, part in ((q, queries), (k, keys), (v, keys))), causal=False, scale=scale
        )
        merged = merge(out_TND[queries], lse_TN[queries], found[0].transpose(0, 1), lse[0].T)
        out_TND[queries], lse_TN[queries] = merged
    return out_TND, lse_TN


def _attend_blocks_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Segments, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for block in segments.blocks:
        above = _taken(grad, block)
        if block.padded is not None:  # a copy, so that what is written here reaches no real place
            above.masked_fill_(block.padded.view(block.size[0], 1, block.size[1], 1), 0.0)
        tensors = (_taken(tensor, block) for tensor in (q, k, v, out, lse))
        parts = attend_backward(above, *tensors, causal=segments.causal, scale=scale)
        for whole, part in zip(grads, parts):
            _put(whole, block, part)
    for queries, keys in segments.prefixes:
        sides = ((grad, queries), (q, queries), (k, keys), (v, keys), (out, queries), (lse, queries))
        parts = attend_backward(*(_span(tensor, part) for tensor, part in sides), causal=False, scale=scale)
        for whole, part, places in zip(grads, parts, (queries, keys, keys)):
            whole[places] += part[0].transpose(0, 1)
    return grads


def _taken(row: Tensor, block: Block) -> Tensor:
    """[T, N, ...] to the block's [sequences, N, length, ...]; a view where the block lies in the row as it is."""
    taken = row[block.places] if isinstance(block.places, slice) else row.index_select(0, block.places)
    return taken.unflatten(0, block.size).transpose(1, 2)


def _put(row: Tensor, block: Block, values: Tensor) -> None:
    """Writes a block's [sequences, N, length, ...] to its places in the row, padding left out."""
    flat = values.transpose(1, 2).flatten(0, 1)
    if isinstance(block.places, slice):
        row[block.places] = flat
    elif block.padded is None:
        row.index_copy_(0, block.places, flat)
    else:
        real = ~block.padded
        row.index_copy_(0, block.places[real], flat[real])


def _span(row: Tensor, places: slice) -> Tensor:
    """[T, N, ...] to [1, N, length, ...] of these places."""
    return row[places].transpose(0, 1).unsqueeze(0)
