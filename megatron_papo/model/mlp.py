"""The two kinds of MLP: gated with SwiGLU, and plain.

SwiGLU is one autograd function, which saves only the first linear layer's output. On a GPU the kernels are
Megatron-Core's fused ones. Two things are added to Megatron-Core's MLP: what follows the first linear layer can be
computed again in backward (`recompute`), and padding at the end of a row stays zero in spite of biases (`num_padding`).
Suffixes: T tokens, F the FFN's width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.fusions import fused_bias_swiglu as fused_kernels
from megatron.core.transformer.mlp import MLP
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_papo.model.fp8.padding import zero_end
from megatron_papo.model.recompute import Recipe, by_recipe, recipe_of, with_recipe
from megatron_papo.model.shape import MlpKind

ACTIVATIONS: dict[MlpKind, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}
"""The activation of each kind of MLP."""


class RecomputingMLP(MLP):
    """Two linear layers with a product between them, of which backward can compute parts again. A subclass says what
    the product is."""

    recompute: Literal["none", "product", "inner"] = "none"
    """What backward computes again: nothing, the product, or also the first linear layer's output."""
    num_padding: int = 0
    """Places of padding at the end of the current row, at which the product is zero."""

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The second linear layer's output and its bias, from hidden states [T, 1, H] (this rank's share under sequence
        parallelism)."""
        assert per_token_scale is None, "experts are not supported"
        inner, bias = self.first_linear(hidden_states)
        multiply = partial(self.product, bias=bias, num_padding=self.num_padding)
        recipe: Recipe | None = None
        if self.recompute == "product":
            recipe = partial(multiply, inner.detach())
        elif self.recompute == "inner":
            first = self.first_linear
            again = _Again(lambda hidden: first(hidden)[0], hidden_states, multiply, shared=inner.requires_grad)
            inner, recipe = with_recipe(inner, again.inner), again.product
        with by_recipe(inner):
            product = self.differentiable_product(inner, bias)
        if recipe is not None:
            product = with_recipe(product, recipe)
        with by_recipe(product):
            return self.linear_fc2(product)

    def first_linear(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        """The first linear layer's output, and the bias that the product has to add to it."""
        return self.linear_fc1(hidden_states)

    def product(self, inner: Tensor, bias: Tensor | None, num_padding: int) -> Tensor:
        """What the second linear layer reads, zero in the last `num_padding` places."""
        raise NotImplementedError

    def differentiable_product(self, inner: Tensor, bias: Tensor | None) -> Tensor:
        """The same for this row, with a gradient."""
        return self.product(inner, bias, self.num_padding)


class GatedMLP(RecomputingMLP):
    """The MLP of kind `swiglu`: silu(gate) times up between two linear layers."""

    @property
    def fused(self) -> bool:
        """Whether Megatron-Core's fused kernels compute SwiGLU."""
        return self.config.bias_activation_fusion

    def product(self, inner: Tensor, bias: Tensor | None, num_padding: int) -> Tensor:
        """silu(gate) times up."""
        return gated_product(inner, bias, num_padding, self.fused)

    def differentiable_product(self, inner: Tensor, bias: Tensor | None) -> Tensor:
        """The same, by a function that needs only `inner` and `bias` for its backward."""
        return SwiGLUFunction.apply(inner, bias, self.num_padding, self.fused)


class PlainMLP(RecomputingMLP):
    """The other kinds of MLP: an activation between two linear layers."""

    def first_linear(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        """The first linear layer's output with its bias, as the activation reads it."""
        inner, bias = self.linear_fc1(hidden_states)
        return inner if bias is None else inner + bias, None

    def product(self, inner: Tensor, bias: Tensor | None, num_padding: int) -> Tensor:
        """The activation's output."""
        return zero_end(self.config.activation_func(inner), num_padding)


class _Again:
    """Computes the first linear layer's output, and what follows it, again in backward from the input of that layer."""

    def __init__(self, linear: Callable[[Tensor], Tensor], hidden: Tensor, multiply: Any, *, shared: bool):
        """`linear` computes the first linear layer's output from hidden states, `multiply` what follows. `shared`:
        whether backward needs that output once more after the product, so that it is stored in between."""
        self._linear, self._multiply, self._shared = linear, multiply, shared
        saved = hidden.detach()
        self._hidden: Recipe = recipe_of(hidden) or (lambda: saved)
        self._stored: Tensor | None = None

    def product(self) -> Tensor:
        """What the second linear layer reads."""
        inner = self.inner()
        self._stored = inner if self._shared else None
        return self._multiply(inner)

    def inner(self) -> Tensor:
        """The first linear layer's output."""
        stored, self._stored = self._stored, None
        return self._linear(self._hidden()) if stored is None else stored


class SwiGLUFunction(torch.autograd.Function):
    """`gated_product` with a backward that needs only the first linear layer's output."""

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
    """The product silu(gate) * up, [T, 1, F], with the last `num_padding` places zero; `inner` [T, 1, 2 F] has the
    gate's half first."""
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
    """The gradient of the inner values, [T, 1, 2 F], in which padding is not yet set to zero."""
    if fused:
        rows, above = inner.flatten(0, -2), grad.flatten(0, -2)
        if bias is None:
            grad_rows = fused_kernels.swiglu_back(above, rows)
        else:
            grad_rows = fused_kernels.bias_swiglu_back(above, rows, bias)
        return grad_rows.view_as(inner)
    inner = inner if bias is None else inner + bias
    gate, up = inner.chunk(2, -1)
    grad_inner = torch.empty_like(inner)
    grad_gate, grad_up = grad_inner.chunk(2, -1)
    torch.mul(grad, F.silu(gate), out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
    return grad_inner
