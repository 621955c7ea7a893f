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
"""Largest 448, smallest 2 ** -9."""
E5M2 = torch.float8_e5m2
"""Largest 57344, smallest 2 ** -16."""

Role = Literal["input", "weight", "gradient"]
BLOCKS = {"blockwise": 128, "mxfp8": 32}
"""Values that share a scale, along what is reduced over."""

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


def format_of(recipe: str, role: Role) -> torch.dtype:
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
        """Under `delayed` the scale of now, the maximum of `values` noted for later ones; else None."""
        history = self.histories.get(role)
        if history is None:
            return None
        history.note(values)
        return history.scale

    def round(self, role: Role, values_RC: Tensor, reduced: int, scale: Tensor | None) -> Tensor:
        """[R, C] to rounded [R, C] float32, for a product that reduces over dimension `reduced`."""
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
    """Maxima of the last `length` micro-batches, and the scale that follows from the largest of them.

    Values that outgrow all of these saturate, once. A maximum of zero or without a number leaves the scale as it is.
    """

    def __init__(self, dtype: torch.dtype, length: int, device: torch.device):
        self.dtype = dtype
        self.maxima = torch.zeros(length, device=device)
        self.scale = torch.ones((), device=device)
        self.pending = torch.zeros((), device=device)
        """Of what was seen since `move_on`."""

    def note(self, values: Tensor) -> None:
        self.pending = torch.maximum(self.pending, largest(values))

    def move_on(self) -> None:
        """What is pending takes its place among the maxima, the oldest leaves."""
        self.maxima = self.maxima.roll(1)
        self.maxima[0] = self.pending
        amax = self.maxima.max()
        known = (amax > 0) & amax.isfinite()
        self.scale = torch.where(known, float_scale(amax, self.dtype), self.scale)
        self.pending = torch.zeros_like(self.pending)
