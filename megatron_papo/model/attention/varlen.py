"""Attention over a whole row with variable-length flash attention, on a GPU in half precision: two kernels a layer.

One kernel attends within every segment, the other from responses to the prompts that they share; their results are
merged as in `kernels.py`. Nothing is padded. This calls torch's internal operators, because the public `varlen_attn`
has no backward that takes the log-sum-exp over more keys.

They take heads of up to 256 values in multiples of 8, among them the published towers' 64, 72 and 80, and refuse others
(`mha_varlen_fwd` in torch's aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp); those are refused as the
model is built (`check_heads`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_papo.config import ConfigError
from megatron_papo.model.attention.kernels import merge
from megatron_papo.model.shape import ModelShape
from megatron_papo.types import to_device

_MULTIPLE, _WIDEST = 8, 256
"""Values of a head that flash attention takes."""
HALF = (torch.bfloat16, torch.float16)
"""The dtypes that it takes."""


def check_heads(shape: ModelShape, dtype: torch.dtype) -> None:
    """Raises ConfigError where a GPU's kernels of half precision have no heads as wide as those of `shape`."""
    if dtype not in HALF:
        return
    for part, head_dim in (
        ("the language model", shape.language.head_dim),
        ("the vision tower", shape.vision.head_dim),
    ):
        if head_dim % _MULTIPLE or head_dim > _WIDEST:
            raise ConfigError(
                f"model.dtype: heads of {part} have {head_dim} values; flash attention takes multiples of {_MULTIPLE} "
                f"up to {_WIDEST}, so on a GPU this model needs float32"
            )


@dataclass(frozen=True)
class _Lengths:
    """Where sequences begin in a packed tensor, as flash attention reads it."""

    starts: Tensor
    """First places of the sequences, and the end of the last one: [sequences + 1] int32."""
    longest: int
    """Tokens of the longest sequence."""

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> _Lengths:
        starts = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        return cls(to_device(starts, device), max(lengths))


@dataclass(frozen=True)
class VarlenPlan:
    """The structure of a row, as variable-length kernels need it."""

    causal: bool
    segments: _Lengths
    queries: _Lengths | None
    """The runs of responses, one for each shared prompt; None when no prompt of the row is shared."""
    keys: _Lengths | None
    """The shared prompts, in the same order."""
    query_index: Tensor | None
    """Places in the row of the runs of responses, int64."""
    key_index: Tensor | None
    """Places in the row of the shared prompts, int64."""

    @classmethod
    def of(
        cls, lengths: Sequence[int], prefixes: Sequence[tuple[slice, slice]], causal: bool, device: torch.device
    ) -> VarlenPlan:
        """The plan of a row whose segments have these lengths. `prefixes`: pairs of the places of responses and those
        of the prompt that they all see."""
        segments = _Lengths.of(lengths, device)
        if not prefixes:
            return cls(causal, segments, None, None, None, None)
        sides = list(zip(*prefixes))
        queries, keys = (_Lengths.of([part.stop - part.start for part in side], device) for side in sides)
        query_index, key_index = (
            to_device(torch.cat([torch.arange(part.start, part.stop) for part in side]), device) for side in sides
        )
        return cls(causal, segments, queries, keys, query_index, key_index)


def varlen_attend(q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor, plan: VarlenPlan, scale: float) -> tuple[Tensor, Tensor]:
    """Attention's output [T, N, D] and log-sum-exp [N, T] fp32 of a row."""
    own = plan.segments
    out_TND, lse_NT = _forward(q_TND, k_TGD, v_TGD, own, own, plan.causal, scale)
    if plan.query_index is None:
        return out_TND, lse_NT
    assert plan.key_index is not None and plan.queries is not None and plan.keys is not None
    rows, keys = plan.query_index, plan.key_index
    more, more_lse = _forward(q_TND[rows], k_TGD[keys], v_TGD[keys], plan.queries, plan.keys, False, scale)
    merged, lse = merge(out_TND[rows], lse_NT.T[rows], more, more_lse.T)
    return out_TND.index_copy(0, rows, merged), lse_NT.index_copy(1, rows, lse.T.contiguous())


def varlen_attend_backward(
    grad_TND: Tensor, q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor, out_TND: Tensor, lse_NT: Tensor,
    plan: VarlenPlan, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of queries, keys and values of a row."""
    own = plan.segments
    grads = _backward(grad_TND, q_TND, k_TGD, v_TGD, out_TND, lse_NT, own, own, plan.causal, scale)
    if plan.query_index is None:
        return grads
    assert plan.key_index is not None and plan.queries is not None and plan.keys is not None
    rows, keys = plan.query_index, plan.key_index
    side = (grad_TND[rows], q_TND[rows], k_TGD[keys], v_TGD[keys], out_TND[rows], lse_NT[:, rows].contiguous())
    more = _backward(*side, plan.queries, plan.keys, False, scale)
    for grad, part, places in zip(grads, more, (rows, keys, keys)):
        grad.index_add_(0, places, part)
    return grads


def _forward(
    q: Tensor, k: Tensor, v: Tensor, queries: _Lengths, keys: _Lengths, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, queries.starts, keys.starts, queries.longest, keys.longest, 0.0, causal, False, scale=scale
    )
    return out, lse


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, queries: _Lengths, keys: _Lengths,
    causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    seed, offset = (torch.zeros(size, dtype=torch.uint64, device=q.device) for size in ((2,), ()))  # no dropout
    return torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, lse, queries.starts, keys.starts, queries.longest, keys.longest, 0.0, causal, seed, offset,
        scale=scale,
    )  # fmt: skip
