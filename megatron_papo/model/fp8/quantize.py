"""Rounding to 8-bit floats and back, with the scaling rules of Transformer Engine 2: pure functions.

A scale multiplies values before they are cast, so that the largest of those which share it meets the format's largest;
what lies beyond saturates. Everything comes back as float32: products of rounded operands are then taken in float32,
as tensor cores accumulate them. Left out: stochastic rounding, 4-bit formats.
Suffixes: R rows, C columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3 = torch.float8_e4m3fn
"""Largest 448, smallest 2 ** -9."""
E5M2 = torch.float8_e5m2
"""Largest 57344, smallest 2 ** -16."""

ScaleOf = Callable[[Tensor, torch.dtype], Tensor]


def rounded(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` as they come back from `dtype`, float32; nearest, ties to even, saturating. NaN stays NaN."""
    limit = torch.finfo(dtype).max
    return (values.float() * scale).clamp(-limit, limit).to(dtype).float() * scale.reciprocal()


def float_scale(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """format's largest / amax in float32; 1 where amax is 0 or not finite, the largest float where it overflows."""
    amax = amax.float()
    scale = (torch.finfo(dtype).max / amax).clamp(max=torch.finfo(torch.float32).max)
    return torch.where((amax > 0) & amax.isfinite(), scale, torch.ones_like(scale))


def e8m0_scale(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """What MXFP8 scales by: 2 ** -e of the least e with amax / 2 ** e within the format; e in 8 bits, -127 to 127."""
    mantissa, exponent = torch.frexp(amax.float() / torch.finfo(dtype).max)
    least = torch.where(mantissa > 0.5, exponent, exponent - 1)
    least = torch.where(mantissa > 0, least, -127).clamp(-127, 127)  # of a quotient that float32 cannot hold
    scale = torch.ldexp(torch.ones_like(mantissa), -least)
    return torch.where((amax > 0) & amax.isfinite(), scale, torch.ones_like(scale))


def round_tensor(values: Tensor, dtype: torch.dtype) -> Tensor:
    """One scale for all values, from their own maximum: current scaling."""
    return rounded(values, float_scale(largest(values), dtype), dtype)


def largest(values: Tensor) -> Tensor:
    """Of the magnitudes, float32; 0 of none."""
    return values.detach().abs().amax().float() if values.numel() else values.new_zeros((), dtype=torch.float32)


def round_rows(values_RC: Tensor, block: int, scale_of: ScaleOf, dtype: torch.dtype) -> Tensor:
    """One scale for every `block` values that follow one another in a row; the last block may be shorter."""
    num_columns = values_RC.shape[1]
    blocks = F.pad(values_RC.float(), (0, -num_columns % block)).unflatten(1, (-1, block))
    scale = scale_of(blocks.abs().amax(-1, keepdim=True), dtype)
    return rounded(blocks, scale, dtype).flatten(1)[:, :num_columns]


def round_columns(values_RC: Tensor, block: int, scale_of: ScaleOf, dtype: torch.dtype) -> Tensor:
    """The same along columns."""
    return round_rows(values_RC.T, block, scale_of, dtype).T


def round_tiles(values_RC: Tensor, block: int, scale_of: ScaleOf, dtype: torch.dtype) -> Tensor:
    """One scale for every tile of `block` x `block` values."""
    num_rows, num_columns = values_RC.shape
    padded = F.pad(values_RC.float(), (0, -num_columns % block, 0, -num_rows % block))
    tiles = padded.unflatten(1, (-1, block)).unflatten(0, (-1, block))
    scale = scale_of(tiles.abs().amax((1, 3), keepdim=True), dtype)
    return rounded(tiles, scale, dtype).flatten(0, 1).flatten(1)[:num_rows, :num_columns]
