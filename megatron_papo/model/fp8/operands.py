"""How each recipe rounds the operands of a linear layer's three products, as Transformer Engine does.

`forward` reduces over the input's width, `dgrad` over the output's, `wgrad` over tokens; blocks lie along what is
reduced over, so a blocked recipe rounds one tensor twice, differently.

| recipe     | input, weight | gradient | one scale for |
|---|---|---|---|
| tensorwise | E4M3 | E5M2 | the tensor, from its own maximum |
| delayed    | E4M3 | E5M2 | the tensor, from the maxima of micro-batches before |
| blockwise  | E4M3 | E4M3 | 1 x 128 values, of weights 128 x 128; scales in float32, as runs here set them on Hopper |
| mxfp8      | E4M3 | E4M3 | 1 x 32 values; scales powers of two |

Suffixes: R rows (tokens, or the weight's outputs), C columns.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from megatron_papo.model.fp8.quantize import (
    E4M3,
    E5M2,
    e8m0_scale,
    float_scale,
    largest,
    round_columns,
    round_rows,
    round_tensor,
    round_tiles,
    rounded,
)

Role = Literal["input", "weight", "gradient"]
BLOCKS = {"blockwise": 128, "mxfp8": 32}
"""Values that share a scale, along what is reduced over."""


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
