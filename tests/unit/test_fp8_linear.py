"""The three products of a rounded linear: which operand is rounded how, along which dimension, forward and backward."""

from __future__ import annotations

import pytest
import torch

from megatron_papo.model.fp8.linear import RoundedProduct
from megatron_papo.model.fp8.rounding import (
    E4M3,
    E5M2,
    Operands,
    e8m0_scale,
    float_scale,
    round_columns,
    round_rows,
    round_tensor,
    round_tiles,
    rounded,
)

CPU = torch.device("cpu")
TOKENS, IN, OUT = 160, 192, 256


def _values(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Input, weight and output gradient, with rows and columns of unlike sizes."""
    random = torch.Generator().manual_seed(seed)
    sizes = ((TOKENS, IN), (OUT, IN), (TOKENS, OUT))
    return tuple(
        torch.randn(size, generator=random) * 10.0 ** torch.randn(size[0], 1, generator=random) for size in sizes
    )


def _products(operands: Operands, x: torch.Tensor, w: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, ...]:
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = RoundedProduct.apply(x.view(TOKENS // 2, 2, IN), w, operands)
    y.backward(g.view(TOKENS // 2, 2, OUT))
    return y.detach().view(TOKENS, OUT), x.grad, w.grad


def _expected(round_x, round_w, round_g, x, w, g):
    """`round_*`: (values, dimension that is reduced over)."""
    return (
        round_x(x, 1) @ round_w(w, 1).T,
        round_g(g, 1) @ round_w(w, 0),
        round_g(g, 0).T @ round_x(x, 0),
    )


def _blocks(block, scale):
    return lambda values, reduced: (round_rows if reduced else round_columns)(values, block, scale, E4M3)


ROUNDERS = {
    "tensorwise": (
        lambda v, _: round_tensor(v, E4M3),
        lambda v, _: round_tensor(v, E4M3),
        lambda v, _: round_tensor(v, E5M2),
    ),
    "blockwise": (
        _blocks(128, float_scale),
        lambda v, _: round_tiles(v, 128, float_scale, E4M3),
        _blocks(128, float_scale),
    ),
    "mxfp8": (_blocks(32, e8m0_scale),) * 3,
}


@pytest.mark.parametrize("recipe", ROUNDERS)
def test_products(recipe):
    x, w, g = _values(0)
    found = _products(Operands(recipe, 1, CPU), x, w, g)
    for got, want, exact in zip(found, _expected(*ROUNDERS[recipe], x, w, g), (x @ w.T, g @ w, g.T @ x)):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
        assert (got - exact).norm() > 1e-3 * exact.norm()  # rounded it was


def test_delayed_products_take_the_scales_of_their_forward():
    """A later forward may move the scales before this backward: its operands keep theirs, the gradient does not."""
    operands = Operands("delayed", 1, CPU)
    x, w, g = _values(1)
    scale = torch.tensor(0.125)
    operands.histories["input"].scale = scale
    x, w = x.requires_grad_(), w.requires_grad_()
    y = RoundedProduct.apply(x, w, operands)
    for role in ("input", "weight"):
        operands.histories[role].move_on()
        assert operands.histories[role].scale == float_scale((x if role == "input" else w).abs().max(), E4M3)
    operands.histories["gradient"].scale = torch.tensor(4.0)
    y.backward(g)
    one = torch.tensor(1.0)
    x, w, grads = x.detach(), w.detach(), (x.grad, w.grad)
    rounded_g = rounded(g, torch.tensor(4.0), E5M2)
    torch.testing.assert_close(y.detach(), rounded(x, scale, E4M3) @ rounded(w, one, E4M3).T)
    torch.testing.assert_close(grads[0], rounded_g @ rounded(w, one, E4M3))
    torch.testing.assert_close(grads[1], rounded_g.T @ rounded(x, scale, E4M3))
    assert operands.histories["gradient"].pending == g.abs().max()


def test_bfloat16_comes_and_goes_and_frozen_weights_get_no_gradient():
    x, w, g = (value.bfloat16() for value in _values(2))
    x = x.requires_grad_()
    y = RoundedProduct.apply(x, w, Operands("tensorwise", 1, CPU))
    assert y.dtype == torch.bfloat16
    y.backward(g)
    assert x.grad.dtype == torch.bfloat16 and w.grad is None
    want = round_tensor(g, E5M2) @ round_tensor(w, E4M3)
    assert torch.equal(x.grad, want.bfloat16())
