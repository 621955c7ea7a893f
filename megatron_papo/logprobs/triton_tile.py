"""The two functions of `torch_tile.py` as Triton kernels for fp32 tiles on CUDA: each reads a tile once.

The sums do not change the logits; gradients overwrite them, or go to a bf16 tile for the products that follow. Tests
compare the kernels with `torch_tile.py` under Triton's interpreter. Suffixes are those of `torch_tile.py`; in the
kernels z and y are logits of the policy and of the masked policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_papo.logprobs.gradients import RowPulls
from megatron_papo.logprobs.sums import FORBIDDEN, RowSums

BLOCK_SIZE = 1024
"""Number of words that a program processes at a time."""
_LOWEST = tl.constexpr(FORBIDDEN)


def tile_sums(logits: Sequence[Tensor], scale: float, columns_C: Tensor, entropy: bool) -> RowSums:
    """What `torch_tile.tile_sums` computes, with the same arguments."""
    num_rows, num_words = logits[0].shape
    sums_10C = logits[0].new_zeros(10, num_rows)
    sums_kernel[(num_rows,)](
        logits[0], logits[-1], columns_C, sums_10C, num_rows, num_words, scale,
        PAIR=len(logits) == 2, ENTROPY=entropy, BLOCK=BLOCK_SIZE,
    )  # fmt: skip
    largest_2C, exp_2C, dot_2C, target_2C = sums_10C[:8].view(4, 2, num_rows)
    if len(logits) == 1:
        return RowSums(largest_2C[:1], exp_2C[:1], dot_2C[:1], target_2C[:1])
    return RowSums(largest_2C, exp_2C, dot_2C, target_2C, sums_10C[8], sums_10C[9])


def tile_gradients(
    logits: Sequence[Tensor], scale: float, columns_C: Tensor, pulls: RowPulls, dtype: torch.dtype
) -> list[Tensor]:
    """What `torch_tile.tile_gradients` computes, with the same arguments."""
    num_rows, num_words = logits[0].shape
    outs = [one if one.dtype == dtype else torch.empty_like(one, dtype=dtype) for one in logits]
    pulls_9C = logits[0].new_zeros(9, num_rows)
    fields = (pulls.normaliser_NR, pulls.constant_NR, pulls.target_NR, pulls.slope_NR)
    for place_2C, field_NC in zip(pulls_9C[:8].view(4, 2, num_rows), fields):
        if field_NC is not None:
            place_2C[: len(logits)] = field_NC
    if pulls.kl_R is not None:
        pulls_9C[8] = pulls.kl_R
    grid: Any = (num_rows, triton.cdiv(num_words, BLOCK_SIZE))
    gradients_kernel[grid](
        logits[0], logits[-1], outs[0], outs[-1], columns_C, pulls_9C, num_rows, num_words, scale,
        PAIR=pulls.kl_R is not None, SLOPE=pulls.slope_NR is not None, BLOCK=BLOCK_SIZE,
    )  # fmt: skip
    return outs


@triton.jit
def _tanh(x):
    """The function tanh without cancellation near 0, where a series to x^9 is exact in fp32."""
    small = tl.minimum(tl.maximum(x, -0.25), 0.25)
    s = small * small
    series = small * (1 + s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835)))))
    large = 1 - 2 / (tl.exp(2 * tl.minimum(tl.abs(x), 20.0)) + 1)
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -large, large))


@triton.jit
def sums_kernel(
    z_ptr, y_ptr, columns_ptr, sums_ptr, num_rows, num_words, scale,
    PAIR: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sums of a row, one program for each row. Every lane has its running sums, which are rescaled when a larger
    logit comes and added up at the end."""
    row = tl.program_id(0)
    start = row.to(tl.int64) * num_words
    z_max = tl.full([], _LOWEST, tl.float32)
    y_max = tl.full([], _LOWEST, tl.float32)
    z_exp = tl.zeros([BLOCK], tl.float32)
    y_exp = tl.zeros([BLOCK], tl.float32)
    z_dot = tl.zeros([BLOCK], tl.float32)
    y_dot = tl.zeros([BLOCK], tl.float32)
    gap = tl.zeros([BLOCK], tl.float32)
    excess = tl.zeros([BLOCK], tl.float32)
    for first in range(0, num_words, BLOCK):
        word = first + tl.arange(0, BLOCK)
        inside = word < num_words
        z = tl.load(z_ptr + start + word, mask=inside, other=_LOWEST) * scale
        z_new = tl.maximum(z_max, tl.max(z, 0))
        z_shift = z_max - z_new
        z_scale = tl.exp(z_shift)
        a = z - z_new
        e = tl.where(inside, tl.exp(a), 0.0)
        if ENTROPY:
            z_dot = (z_dot + z_shift * z_exp) * z_scale + e * a
        if PAIR:
            y = tl.load(y_ptr + start + word, mask=inside, other=_LOWEST) * scale
            y_new = tl.maximum(y_max, tl.max(y, 0))
            y_shift = y_max - y_new
            y_scale = tl.exp(y_shift)
            b = y - y_new
            f = tl.where(inside, tl.exp(b), 0.0)
            if ENTROPY:
                y_dot = (y_dot + y_shift * y_exp) * y_scale + f * b
            apart = z_shift - y_shift
            gap = (gap + apart * z_exp) * z_scale + e * (a - b)
            between = (z_scale + y_scale) * _tanh(-apart / 2)
            excess = excess * y_scale + between * z_exp + (e + f) * _tanh((b - a) / 2)
            y_exp = y_exp * y_scale + f
            y_max = y_new
        z_exp = z_exp * z_scale + e
        z_max = z_new
    column = tl.load(columns_ptr + row)
    here = column >= 0
    at = sums_ptr + row
    tl.store(at, z_max)
    tl.store(at + 2 * num_rows, tl.sum(z_exp, 0))
    tl.store(at + 4 * num_rows, tl.sum(z_dot, 0))
    tl.store(at + 6 * num_rows, tl.load(z_ptr + start + column, mask=here, other=0.0) * scale)
    if PAIR:
        tl.store(at + num_rows, y_max)
        tl.store(at + 3 * num_rows, tl.sum(y_exp, 0))
        tl.store(at + 5 * num_rows, tl.sum(y_dot, 0))
        tl.store(at + 7 * num_rows, tl.load(y_ptr + start + column, mask=here, other=0.0) * scale)
        tl.store(at + 8 * num_rows, tl.sum(gap, 0))
        tl.store(at + 9 * num_rows, tl.sum(excess, 0))


@triton.jit
def gradients_kernel(
    z_ptr, y_ptr, z_out_ptr, y_out_ptr, columns_ptr, pulls_ptr, num_rows, num_words, scale,
    PAIR: tl.constexpr, SLOPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of a block of words of a row, one program for each. `pulls_ptr`: the fields of RowPulls, two rows
    each, then kl."""
    row = tl.program_id(0)
    start = row.to(tl.int64) * num_words
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = word < num_words
    is_target = word == tl.load(columns_ptr + row)
    at = pulls_ptr + row
    log_p = tl.load(z_ptr + start + word, mask=inside, other=_LOWEST) * scale - tl.load(at)
    p = tl.exp(log_p)
    z_pull = tl.load(at + 2 * num_rows)
    if SLOPE:
        z_pull += tl.load(at + 6 * num_rows) * log_p
    if PAIR:
        log_q = tl.load(y_ptr + start + word, mask=inside, other=_LOWEST) * scale - tl.load(at + num_rows)
        q = tl.exp(log_q)
        kl = tl.load(at + 8 * num_rows)
        y_pull = tl.load(at + 3 * num_rows)
        if SLOPE:
            y_pull += tl.load(at + 7 * num_rows) * log_q
        y_grad = q * y_pull + kl * (q - p) + tl.where(is_target, tl.load(at + 5 * num_rows), 0.0)
        tl.store(y_out_ptr + start + word, y_grad.to(y_out_ptr.dtype.element_ty), mask=inside)
        z_pull += kl * (log_p - log_q)
    z_grad = p * z_pull + tl.where(is_target, tl.load(at + 4 * num_rows), 0.0)
    tl.store(z_out_ptr + start + word, z_grad.to(z_out_ptr.dtype.element_ty), mask=inside)
