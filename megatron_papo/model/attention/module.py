"""Megatron's core attention over a packed row, for the language model and for the vision tower.

A row [T, 1, H] has segments laid end to end; `packed_layout.py` says which places see which. Attention is one autograd
function over the row. So only the row's queries, keys, values, output and log-sum-exp are saved for backward, and none
of the blocks in which it is computed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_papo.model.attention.kernels import attend, attend_backward, merge
from megatron_papo.model.attention.packed_layout import AttentionBlock, Segments, WindowedSegments
from megatron_papo.model.attention.varlen import HALF, VarlenPlan, varlen_attend, varlen_attend_backward


class StructuredAttention(torch.nn.Module):
    """Megatron's core attention over a packed row, whose structure is passed as `packed_seq_params`."""

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
        """Attention's output [T, 1, heads * D] of queries [T, 1, heads, D] and of keys and values [T, 1, key-value
        heads, D].

        The padding at the end of the row, whose length `packed_seq_params` has, is left out: its output is zero,
        without gradient.
        """
        assert attention_mask is None, "the structure of a row is in packed_seq_params"
        scale = self.softmax_scale or query_T1ND.shape[-1] ** -0.5
        num_padding = packed_seq_params.num_padding
        num_places = query_T1ND.shape[0] - num_padding
        row = (tensor.squeeze(1)[:num_places] for tensor in (query_T1ND, key_T1GD, value_T1GD))
        out_TND = _RowAttention.apply(*row, packed_seq_params.of_layer(self.layer), scale, num_padding)
        return out_TND.flatten(1).unsqueeze(1)


class _RowAttention(torch.autograd.Function):
    """Attention over a row [T, heads, D]. The copies that blocks need are made again in backward."""

    @staticmethod
    def forward(
        ctx: Any, q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor, segments: Segments, scale: float, num_padding: int
    ) -> Tensor:
        if segments.rotation is not None:
            q_TND, k_TGD = segments.rotation.turn(q_TND), segments.rotation.turn(k_TGD)
            v_TGD = v_TGD.contiguous()  # a view would keep the whole output of the projection in memory
        plan = _varlen_plan(q_TND, segments)
        if plan is not None:
            out_TND, lse = varlen_attend(q_TND, k_TGD, v_TGD, plan, scale)
        else:
            out_TND, lse = attend_blocks(q_TND, k_TGD, v_TGD, segments, scale)
        if num_padding:  # padded before it is saved, so that one tensor serves backward and the projection
            out_TND = F.pad(out_TND, (0, 0, 0, 0, 0, num_padding))
        ctx.save_for_backward(q_TND, k_TGD, v_TGD, out_TND, lse)
        ctx.segments, ctx.scale = segments, scale
        return out_TND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TND: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q_TND, k_TGD, v_TGD, out_TND, lse = ctx.saved_tensors
        grad_TND, out_TND = grad_TND[: q_TND.shape[0]], out_TND[: q_TND.shape[0]]
        plan = _varlen_plan(q_TND, ctx.segments)
        if plan is not None:
            grads = varlen_attend_backward(grad_TND, q_TND, k_TGD, v_TGD, out_TND, lse, plan, ctx.scale)
        else:
            grads = attend_blocks_backward(grad_TND, q_TND, k_TGD, v_TGD, out_TND, lse, ctx.segments, ctx.scale)
        if ctx.segments.rotation is not None:
            grads = *(ctx.segments.rotation.rotate_inverse(grad) for grad in grads[:2]), grads[2]
        return *grads, None, None, None


def _varlen_plan(query: Tensor, segments: Segments) -> VarlenPlan | None:
    """The plan for variable-length kernels; None where they do not exist: outside of half precision, and on the CPU."""
    return segments.varlen if query.dtype in HALF else None


def attend_blocks(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> tuple[Tensor, Tensor]:
    """Attention's output [T, N, D] and log-sum-exp [T, N], block by block."""
    out_TND = torch.empty_like(q)
    lse_TN = q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
    for block in segments.blocks:
        out, lse = attend(*(_taken(tensor, block) for tensor in (q, k, v)), causal=segments.causal, scale=scale)
        _put(out_TND, block, out)
        _put(lse_TN, block, lse)
    for queries, keys in segments.prefixes:
        out, lse = attend(
            *(_span(t, part) for t, part in ((q, queries), (k, keys), (v, keys))), causal=False, scale=scale
        )
        merged = merge(out_TND[queries], lse_TN[queries], out[0].transpose(0, 1), lse[0].T)
        out_TND[queries], lse_TN[queries] = merged
    return out_TND, lse_TN


def attend_blocks_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Segments, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, block by block."""
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for block in segments.blocks:
        above = _taken(grad, block)
        if block.padded is not None:  # `above` is a copy, so writing zeros to its padding changes no token of the row
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


def _taken(row: Tensor, block: AttentionBlock) -> Tensor:
    """The block's values [sequences, N, length, ...] from a row [T, N, ...]; a view where its places follow one
    another."""
    taken = row[block.places] if isinstance(block.places, slice) else row.index_select(0, block.places)
    return taken.unflatten(0, block.size).transpose(1, 2)


def _put(row: Tensor, block: AttentionBlock, values: Tensor) -> None:
    """Writes a block's values [sequences, N, length, ...] to their places in the row, without the padding."""
    flat = values.transpose(1, 2).flatten(0, 1)
    if isinstance(block.places, slice):
        row[block.places] = flat
    elif block.padded is None:
        row.index_copy_(0, block.places, flat)
    else:
        real = ~block.padded
        row.index_copy_(0, block.places[real], flat[real])


def _span(row: Tensor, places: slice) -> Tensor:
    """The values at `places` as [1, N, length, ...], from a row [T, N, ...]."""
    return row[places].transpose(0, 1).unsqueeze(0)
