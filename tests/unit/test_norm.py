"""The norm that keeps its input alone, against the formula as torch differentiates it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_papo.model.norm import RMSNormFunction

EPS = 1e-6


def _plain(hidden: Tensor, weight: Tensor) -> Tensor:
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    return weight * F.rms_norm(wide, weight.shape, eps=EPS).to(hidden.dtype)


def _case(dtype: torch.dtype, *, rows: int = 6, width: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """Input, weight and gradient of the output."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(rows, 1, width, generator=generator, dtype=torch.float64) * 3
    weight = torch.randn(width, generator=generator, dtype=torch.float64) + 1
    grad = torch.randn(rows, 1, width, generator=generator, dtype=torch.float64)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), grad.to(dtype)


def _results(norm, hidden: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    output = norm(hidden, weight)
    return [output.detach(), *torch.autograd.grad(output, (hidden, weight), grad)]


def _ours(hidden: Tensor, weight: Tensor) -> Tensor:
    return RMSNormFunction.apply(hidden, weight, EPS)


def test_gradients_equal_finite_differences():
    hidden, weight, _ = _case(torch.float64)
    assert torch.autograd.gradcheck(_ours, (hidden, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [40, 192, 2048])
def test_forward_is_the_formula_bit_for_bit_and_backward_no_less_exact(dtype, width):
    case = _case(dtype, rows=50, width=width)
    exact = _results(_plain, *(tensor.detach().double() for tensor in case))
    plain, ours = _results(_plain, *case), _results(_ours, *case)
    assert torch.equal(ours[0], plain[0]) and [each.dtype for each in ours] == [dtype] * 3
    for name, found, was, right in zip(("hidden", "weight"), ours[1:], plain[1:], exact[1:]):
        error, before = ((tensor.double() - right).norm() / right.norm() for tensor in (found, was))
        print(f"{dtype} {width} {name}: {error:.2e}, before {before:.2e}")
        assert error < 1e-6 if dtype == torch.float32 else error <= before, name


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_gets_no_gradient_and_a_norm_used_twice_gets_both(frozen):
    hidden, weight, grad = _case(torch.float32)
    expected = torch.autograd.grad(_plain(_plain(hidden, weight), weight), (hidden, weight), grad)
    parts = {"hidden": hidden, "weight": weight}
    parts[frozen].requires_grad_(False)
    _ours(_ours(hidden, weight), weight).backward(grad)
    for (name, tensor), right in zip(parts.items(), expected):
        if name == frozen:
            assert tensor.grad is None
        else:
            torch.testing.assert_close(tensor.grad, right, atol=2e-5, rtol=1e-5)


def test_input_and_one_number_a_token_are_kept():
    hidden, weight, _ = _case(torch.bfloat16)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _ours(hidden, weight)
    other = [tensor for tensor in kept if tensor is not hidden and tensor is not weight]
    assert [(tensor.dtype, tuple(tensor.shape)) for tensor in other] == [(torch.float32, (6, 1, 1))]


def test_what_a_gpus_kernel_is_asked_is_this_gradient():
    """By torch's own decomposition of it, in float32."""
    hidden, weight, grad = _case(torch.float32)
    kernel = torch._decomp.decomposition_table[torch.ops.aten._fused_rms_norm_backward.default]
    scale_T1 = torch.rsqrt(hidden.detach().square().mean(-1, keepdim=True) + EPS)
    found = kernel(grad, hidden.detach(), weight.shape, scale_T1, weight.detach(), [True, True])
    for ours, theirs in zip(_results(_ours, hidden, weight, grad)[1:], found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
