"""Inputs of layers that are computed again in backward instead of being saved.

A tensor may carry its recipe: the function that made it. Where an operation runs under `by_recipe` and would save the
tensor until its backward, it saves the recipe, and backward computes the same values, bit for bit, since a recipe does
what forward did. This is done where it saves many bytes for little time: for norms and the product of SwiGLU
(`selective`), then also for the MLP's first linear layer (`mlp`), see `mlp.py`.

Megatron-Core's own modes serve only FP8 (`transformer_config.py`): `layernorm` compiles a C++ extension in the first
backward, and `mlp` also repeats the product of the second linear layer, which nothing reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Recipe = Callable[[], Tensor]
"""Computes the values once more, contiguous; called while no gradients are recorded."""


def with_recipe(values: Tensor, recipe: Recipe) -> Tensor:
    """`values` itself, with `recipe` attached to it."""
    carrier: Any = values
    carrier.recipe = recipe
    return values


def recipe_of(values: Tensor) -> Recipe | None:
    """The recipe that `with_recipe` attached to `values`; None where there is none."""
    return getattr(values, "recipe", None)


@contextmanager
def by_recipe(values: Tensor) -> Iterator[None]:
    """A context in which operations save the recipe of `values` instead of `values`, if it has one.

    Views of `values` are recognized by their storage. Parameters that are saved come back without their Python
    attributes, so Apex's fused accumulation of gradients, which marks parameters, cannot be used with it
    (`fusions.py`).
    """
    recipe = recipe_of(values)
    if recipe is None or not torch.is_grad_enabled():
        yield
        return
    storage, numel = values.untyped_storage()._cdata, values.numel()  # `values` lives as long as this block

    def save(tensor: Tensor) -> Tensor | _SavedRecipe:
        if tensor.untyped_storage()._cdata != storage or tensor.numel() != numel or not tensor.is_contiguous():
            return tensor
        return _SavedRecipe(recipe, tensor.shape)

    with torch.autograd.graph.saved_tensors_hooks(save, _restored):
        yield


@dataclass(frozen=True)
class _SavedRecipe:
    """A recipe saved for backward in place of a tensor of this shape."""

    recipe: Recipe
    shape: torch.Size


def _restored(saved: Tensor | _SavedRecipe) -> Tensor:
    if not isinstance(saved, _SavedRecipe):
        return saved
    with torch.no_grad():
        return saved.recipe().view(saved.shape)
