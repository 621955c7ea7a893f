"""What a layer reads, computed again in backward instead of kept.

A tensor may carry the recipe that it was made by. Where an operation runs under `by_recipe` and would keep the tensor
until its backward, it keeps the recipe, and backward computes the same values: bit for bit, since what a recipe does is
what forward did. Only what is worth it is done so, by bytes kept per time of computing them again: norms and the
product of SwiGLU (`selective`), then the MLP's first linear too (`mlp`), see `mlp.py`.

Megatron-Core's own modes are not used, but by FP8 (`transformer_config.py`): `layernorm` compiles a C++ extension in
the first backward, and `mlp` also multiplies by the second linear again, which nothing reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Recipe = Callable[[], Tensor]
"""Gives the values once more, contiguous; called without gradients being recorded."""


def with_recipe(values: Tensor, recipe: Recipe) -> Tensor:
    """`values` itself, which from now on carries its recipe."""
    carrier: Any = values
    carrier.recipe = recipe
    return values


def recipe_of(values: Tensor) -> Recipe | None:
    return getattr(values, "recipe", None)


@contextmanager
def by_recipe(values: Tensor) -> Iterator[None]:
    """Operations within keep the recipe of `values` in its place, if it has one; all else as ever.

    Views of it are recognized by their storage. Parameters that are kept come back without attributes of Python's: so
    Apex's fused accumulation of gradients, which marks them, does not go with it (`fusions.py`).
    """
    recipe = recipe_of(values)
    if recipe is None or not torch.is_grad_enabled():
        yield
        return
    storage, numel = values.untyped_storage()._cdata, values.numel()  # `values` lives as long as this block

    def keep(tensor: Tensor) -> Tensor | _Kept:
        if tensor.untyped_storage()._cdata != storage or tensor.numel() != numel or not tensor.is_contiguous():
            return tensor
        return _Kept(recipe, tensor.shape)

    with torch.autograd.graph.saved_tensors_hooks(keep, _give_back):
        yield


@dataclass(frozen=True)
class _Kept:
    recipe: Recipe
    shape: torch.Size


def _give_back(kept: Tensor | _Kept) -> Tensor:
    if not isinstance(kept, _Kept):
        return kept
    with torch.no_grad():
        return kept.recipe().view(kept.shape)
