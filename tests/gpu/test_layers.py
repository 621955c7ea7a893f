"""On a GPU, in bf16: the norm's kernel and Megatron-Core's fused SwiGLU against fp64, and what is computed again
against what is kept: the same bits. Skipped without a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_papo.model.norm import RMSNormFunction
from tests.support.gated_mlp import GatedMLPBetween

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

CLOSE = 0.01
"""Of the norm of all values: a bf16 rounding is 2 ** -8 = 0.004 at most, and the MLP has three."""
ROWS, HIDDEN, WIDTH = 300, 2048, 11008


def _values(*size: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(sum(size))
    return torch.randn(*size, generator=generator, device="cuda").bfloat16()


def _gap(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def test_the_norm_and_its_gradients_are_those_of_fp64():
    hidden, weight, grad = _values(ROWS, 1, HIDDEN), _values(HIDDEN), _values(ROWS, 1, HIDDEN)
    ours = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    exact = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
    output = RMSNormFunction.apply(*ours, 1e-6)
    right = exact[1] * F.rms_norm(exact[0], (HIDDEN,), eps=1e-6)
    found = [output, *torch.autograd.grad(output, ours, grad)]
    expected = [right, *torch.autograd.grad(right, exact, grad.double())]
    for name, one, other in zip(("output", "hidden", "weight"), found, expected, strict=True):
        assert _gap(one, other.detach()) < CLOSE, name


def _mlp(mode: str, hidden: Tensor, first: Tensor, second: Tensor) -> Tensor:
    layer = GatedMLPBetween(
        lambda values: (F.linear(values, first), None),
        lambda values: (F.linear(values, second), None),
        recompute=mode,
        num_padding=7,
        fused=True,
    )
    return layer(hidden)[0]


def test_the_mlp_is_that_of_fp64_and_computed_again_the_same_bits_of_fewer_bytes():
    hidden, first, second = _values(ROWS, 1, HIDDEN), _values(2 * WIDTH, HIDDEN) / 45, _values(HIDDEN, WIDTH) / 105
    grad, results, held = _values(ROWS, 1, HIDDEN), {}, {}
    for mode in ("none", "product", "inner"):
        ours = [tensor.clone().requires_grad_() for tensor in (hidden, first, second)]
        before = torch.cuda.memory_allocated()
        output = _mlp(mode, *ours)
        held[mode] = torch.cuda.memory_allocated() - before
        results[mode] = [output.detach(), *torch.autograd.grad(output, ours, grad)]
    exact = [tensor.double().requires_grad_() for tensor in (hidden, first, second)]
    gate, up = F.linear(exact[0], exact[1]).chunk(2, -1)
    product = F.pad((F.silu(gate) * up)[:-7], (0, 0, 0, 0, 0, 7))
    right = F.linear(product, exact[2])
    expected = [right.detach(), *torch.autograd.grad(right, exact, grad.double())]
    for found, other in zip(results["none"], expected, strict=True):
        assert _gap(found, other) < CLOSE
    for mode in ("product", "inner"):
        assert all(torch.equal(one, other) for one, other in zip(results[mode], results["none"], strict=True)), mode
    row = 2 * ROWS * WIDTH  # of one value a place
    assert held["none"] - held["product"] >= 0.9 * row and held["product"] - held["inner"] >= 0.9 * 2 * row
