"""Positions of the tokens of a prompt for rotary embeddings, as the family of the model counts them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

from torch import Tensor

from megatron_papo.model.family import family_of
from megatron_papo.model.shape import ModelShape


class PositionsModule(Protocol):
    """A family's module `positions`."""

    def prompt_positions(self, token_ids_S: Tensor, grid_thw_I3: Tensor | None, shape: ModelShape) -> Tensor:
        """Positions in time, height and width, [3, S] int64. The positions of a response begin at the largest value
        plus one, in all three axes. Raises ValueError where image tokens and grids do not match."""


def positions_of(shape: ModelShape) -> Callable[[Tensor, Tensor | None], Tensor]:
    """The function from a prompt's token ids and grids to its positions, for a model of `shape`; `packing` takes it."""
    module: PositionsModule = family_of(shape).module("positions")
    return partial(module.prompt_positions, shape=shape)
