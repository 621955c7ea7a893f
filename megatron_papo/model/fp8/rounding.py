"""Rounding to 8-bit floats and back, as Transformer Engine 2 rounds the operands of a linear layer's three products.

Of the three products `forward` reduces over the input's width, `dgrad` over the output's width and `wgrad` over tokens.
Blocks lie along the dimension that is reduced, so a recipe with blocks rounds one tensor in two different ways.

| recipe     | input, weight | gradient | one scale for |
|---|---|---|---|
| tensorwise | E4M3 | E5M2 | the tensor, from its own maximum |
| delayed    | E4M3 | E5M2 | the tensor, from the maxima of earlier micro-batches |
| blockwise  | E4M3 | E4M3 | 1 x 128 values, 128 x 128 for weights; scales in float32, as set on Hopper |
| mxfp8      | E4M3 | E4M3 | 1 x 32 values; scales are powers of two |

A scale multiplies values before they are cast, so that the largest magnitude of the values that share it becomes the
format's largest number; what lies beyond saturates. Rounded values come back as float32: products of rounded operands
are then taken in float32, as tensor cores accumulate them. Left out: stochastic rounding, 4-bit formats.
Suffixes: R rows (tokens, or the weight's outputs), C columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3 = torch.float8_e4m3fn
"""Its largest number is 448, its smallest 2 ** -9."""
E5M2 = torch.float8_e5m2
"""Its largest number is 57344, its smallest 2 ** -16."""

Role = Literal["input", "weight", "gradient"]
BLOCKS = {"blockwise": 128, "mxfp8": 32}
"""Number of values that share a scale, along the dimension that is reduced."""

ScaleOf = Callable[[Tensor, torch.dtype], Tensor]


def rounded(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` cast to `dtype` and back to float32: to the nearest, ties to even, saturating. NaN stays NaN."""
    limit = torch.finfo(dtype).max
    return (values.float() * scale).clamp(-limit, limit).to(dtype).float() * scale.reciprocal()


def float_scale(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """The format's largest number / amax, in float32; 1 where amax is 0 or not finite, the largest float on
    overflow."""
    amax = amax.float()
    scale = (torch.finfo(dtype).max / amax).clamp(max=torch.finfo(torch.float32).max)
    return torch.where((amax > 0) & amax.isfinite(), scale, torch.ones_like(scale))


def e8m0_scale(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """MXFP8's scale: 2 ** -e for the least e for which amax / 2 ** e lies within the format; e from -127 to 127 (8
    bits)."""
    mantissa, exponent = torch.frexp(amax.float() / torch.finfo(dtype).max)
    least = torch.where(mantissa > 0.5, exponent, exponent - 1)
    least = torch.where(mantissa > 0, least, -127).clamp(-127, 127)  # the quotient was too small for float32
    scale = torch.ldexp(torch.ones_like(mantissa), -least)
    return torch.where((amax > 0) & amax.isfinite(), scale, torch.ones_like(scale))


def round_tensor(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` rounded with one scale for all, from their own maximum (current scaling)."""
    return rounded(values, float_scale(largest(values), dtype), dtype)


def largest(values: Tensor) -> Tensor:
    """The largest magnitude of `values` in float32; 0 where there are none."""
    return values.detach().abs().amax().float() if values.numel() else values.new_zeros((), dtype=torch.float32)


def round_rows(values_RC: Tensor, block: int, scale_of: ScaleOf, dtype: torch.dtype) -> Tensor:
    """`values_RC` rounded with one scale for every `block` neighbours in a row; the last block may be shorter."""
    num_columns = values_RC.shape[1]
    blocks = F.pad(values_RC.float(), (0, -num_columns % block)).unflatten(1, (-1, block))
    scale = scale_of(blocks.abs().amax(-1, keepdim=True), dtype)
    return rounded(blocks, scale, dtype).flatten(1)[:, :num_columns]


def round_columns(values_RC: Tensor, block: int, scale_of: ScaleOf, dtype: torch.dtype) -> Tensor:
    """`values_RC` rounded with one scale for every `block` neighbours in a column."""
    return round_rows(values_RC.T, block, scale_of, dtype).T


def round_tiles(values_RC: Tensor, block: int, scale_of: ScaleOf, dtype: torch.dtype) -> Tensor:
    """`values_RC` rounded with one scale for every tile of `block` x `block` values."""
    num_rows, num_columns = values_RC.shape
    padded = F.pad(values_RC.float(), (0, -num_columns % block, 0, -num_rows % block))
    tiles = padded.unflatten(1, (-1, block)).unflatten(0, (-1, block))
    scale = scale_of(tiles.abs().amax((1, 3), keepdim=True), dtype)
    return rounded(tiles, scale, dtype).flatten(0, 1).flatten(1)[:num_rows, :num_columns]


def format_of(recipe: str, role: Role) -> torch.dtype:
    """The format to which the recipe rounds operands of this role."""
    hybrid = recipe in ("tensorwise", "delayed")
    return E5M2 if role == "gradient" and hybrid else E4M3


class Operands:
    """Rounds the operands of one linear layer; under `delayed` it remembers their maxima."""

    def __init__(self, recipe: str, amax_history: int, device: torch.device):
        self.recipe = recipe
        self.histories: dict[Role, AmaxHistory] = {}
        if recipe == "delayed":
            roles: tuple[Role, ...] = ("input", "weight", "gradient")
            self.histories = {role: AmaxHistory(format_of(recipe, role), amax_history, device) for role in roles}

    def scale(self, role: Role, values: Tensor) -> Tensor | None:
        """Under `delayed` the present scale, and the maximum of `values` is noted for later scales; otherwise None."""
        history = self.histories.get(role)
        if history is None:
            return None
        history.note(values)
        return history.scale

    def round(self, role: Role, values_RC: Tensor, reduced: int, scale: Tensor | None) -> Tensor:
        """`values_RC` rounded, in float32, for a product that reduces over dimension `reduced` (0 or 1)."""
        dtype = format_of(self.recipe, role)
        if self.recipe == "delayed":
            assert scale is not None
            return rounded(values_RC, scale, dtype)
        if self.recipe == "tensorwise":
            return round_tensor(values_RC, dtype)
        block = BLOCKS[self.recipe]
        if self.recipe == "blockwise" and role == "weight":
            return round_tiles(values_RC, block, float_scale, dtype)
        along = round_rows if reduced == 1 else round_columns
        return along(values_RC, block, float_scale if self.recipe == "blockwise" else e8m0_scale, dtype)


class AmaxHistory:
    """The maxima of the last `length` micro-batches, and the scale that follows from the largest of them.

    Values larger than all of these saturate, in one micro-batch. A maximum of zero, inf or NaN leaves the scale as it
    is.
    """

    def __init__(self, dtype: torch.dtype, length: int, device: torch.device):
        self.dtype = dtype
        self.maxima = torch.zeros(length, device=device)
        self.scale = torch.ones((), device=device)
        self.pending = torch.zeros((), device=device)
        """Maximum of the values noted since the last `move_on`."""

    def note(self, values: Tensor) -> None:
        self.pending = torch.maximum(self.pending, largest(values))

    def move_on(self) -> None:
        """Moves the pending maximum into the history, drops the oldest one and sets the scale."""
        self.maxima = self.maxima.roll(1)
        self.maxima[0] = self.pending
        amax = self.maxima.max()
        known = (amax > 0) & amax.isfinite()
        self.scale = torch.where(known, float_scale(amax, self.dtype), self.scale)
        self.pending = torch.zeros_like(self.pending)
