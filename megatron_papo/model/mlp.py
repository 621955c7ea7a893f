"""Megatron-Core's gated MLP with SwiGLU as one autograd function, which keeps the first linear's output alone.

On a GPU the kernels are Megatron-Core's fused ones. Two more things that Megatron-Core's has not: what follows the
first linear can be computed again in backward (`recompute`), and places of padding at the end of a row stay zero in
spite of biases (`num_padding`). Suffixes: T tokens, F the FFN's width.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.fusions import fused_bias_swiglu as fused_kernels
from megatron.core.transformer.mlp import MLP
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_papo.model.recompute import Recipe, by_recipe, recipe_of, with_recipe


class GatedMLP(MLP):
    recompute: Literal["none", "product", "inner"] = "none"
    """What backward computes again: the product of SwiGLU, or the first linear's output too."""
    num_padding: int = 0
    """Places at the end of the row under way whose product is zero."""

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, Tensor | None]:
        assert per_token_scale is None, "experts are not supported"
        inner, bias = self.linear_fc1(hidden_states)
        multiply = partial(gated_product, bias=bias, num_padding=self.num_padding, fused=self.fused)
        recipe: Recipe | None = None
        if self.recompute == "product":
            recipe = partial(multiply, inner.detach())
        elif self.recompute == "inner":
            again = _Again(self.linear_fc1, hidden_states, multiply, shared=inner.requires_grad)
            inner, recipe = with_recipe(inner, again.inner), again.product
        with by_recipe(inner):
            product = SwiGLUFunction.apply(inner, bias, self.num_padding, self.fused)
        if recipe is not None:
            product = with_recipe(product, recipe)
        with by_recipe(product):
            return self.linear_fc2(product)

    @property
    def fused(self) -> bool:
        return self.config.bias_activation_fusion


class _Again:
    """The first linear's output and what is made of it, computed again from what that linear reads."""

    def __init__(self, linear: torch.nn.Module, hidden: Tensor, multiply: Any, *, shared: bool):
        """`shared`: the output is asked for after the product, and is held for that in between."""
        self._linear, self._multiply, self._shared = linear, multiply, shared
        kept = hidden.detach()
        self._hidden: Recipe = recipe_of(hidden) or (lambda: kept)
        self._held: Tensor | None = None

    def product(self) -> Tensor:
        inner = self.inner()
        self._held = inner if self._shared else None
        return self._multiply(inner)

    def inner(self) -> Tensor:
        held, self._held = self._held, None
        return self._linear(self._hidden())[0] if held is None else held


class SwiGLUFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inner: Tensor, bias: Tensor | None, num_padding: int, fused: bool) -> Tensor:
        ctx.save_for_backward(inner, bias)
        ctx.num_padding, ctx.fused = num_padding, fused
        return gated_product(inner, bias, num_padding, fused)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        inner, bias = ctx.saved_tensors
        grad_inner = _gradient(grad, inner, bias, ctx.fused)
        if ctx.num_padding:
            grad_inner[-ctx.num_padding :] = 0
        grad_bias = grad_inner.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return grad_inner, grad_bias, None, None


def gated_product(inner: Tensor, bias: Tensor | None, num_padding: int, fused: bool) -> Tensor:
    """silu(gate) * up of [T, 1, 2 F], the gate's half first: [T, 1, F], the last `num_padding` places zero."""
    if fused:
        rows = inner.flatten(0, -2)
        product = fused_kernels.swiglu(rows) if bias is None else fused_kernels.bias_swiglu(rows, bias)
        product = product.view(*inner.shape[:-1], -1)
    else:
        gate, up = (inner if bias is None else inner + bias).chunk(2, -1)
        product = F.silu(gate).mul_(up)
    if num_padding:
        product[-num_padding:] = 0
    return product


def _gradient(grad: Tensor, inner: Tensor, bias: Tensor | None, fused: bool) -> Tensor:
    """Of the inner values, [T, 1, 2 F], with nothing set to zero."""
    if fused:
        rows, above = inner.flatten(0, -2), grad.flatten(0, -2)
        if bias is None:
            found = fused_kernels.swiglu_back(above, rows)
        else:
            found = fused_kernels.bias_swiglu_back(above, rows, bias)
        return found.view_as(inner)
    inner = inner if bias is None else inner + bias
    gate, up = inner.chunk(2, -1)
    found = torch.empty_like(inner)
    grad_gate, grad_up = found.chunk(2, -1)
    torch.mul(grad, F.silu(gate), out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
    return found
