"""SwiGLU as one function, and what is computed again instead of kept: the same numbers, of fewer bytes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_papo.config import load_config
from megatron_papo.model.mlp import SwiGLUFunction
from tests.support.gated_mlp import GatedMLPBetween

WIDTH, ROWS = 24, 10


def _plain(inner: Tensor, bias: Tensor | None, num_padding: int) -> Tensor:
    """As Megatron-Core computes it without fused kernels."""
    gate, up = (inner if bias is None else inner + bias).chunk(2, -1)
    product = F.silu(gate) * (up + 0.0)
    return F.pad(product[: ROWS - num_padding], (0, 0, 0, 0, 0, num_padding)) if num_padding else product


def _case(dtype: torch.dtype, biased: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(5)
    inner = torch.randn(ROWS, 1, 2 * WIDTH, generator=generator).to(dtype).requires_grad_()
    bias = torch.randn(2 * WIDTH, generator=generator).to(dtype).requires_grad_() if biased else None
    return inner, bias, torch.randn(ROWS, 1, WIDTH, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("num_padding", [0, 3])
def test_product_and_gradients_are_megatrons_bit_for_bit(dtype, biased, num_padding):
    inner, bias, grad = _case(dtype, biased)
    inputs = [tensor for tensor in (inner, bias) if tensor is not None]
    expected = _plain(inner, bias, num_padding)
    found = SwiGLUFunction.apply(inner, bias, num_padding, False)
    assert torch.equal(found, expected)
    gradients = torch.autograd.grad(expected, inputs, grad)
    for ours, theirs in zip(torch.autograd.grad(found, inputs, grad), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0)


@pytest.mark.parametrize("biased", [False, True])
def test_with_megatrons_fused_kernels_it_is_the_same_to_rounding(biased, monkeypatch):
    """Their functions, not compiled."""
    from megatron_papo.model.mlp import fused_kernels

    for name in ("swiglu", "bias_swiglu", "swiglu_back", "bias_swiglu_back"):
        compiled = getattr(fused_kernels, name)
        monkeypatch.setattr(fused_kernels, name, getattr(compiled, "_torchdynamo_orig_callable", compiled))
    inner, bias, grad = _case(torch.float32, biased)
    inputs = [tensor for tensor in (inner, bias) if tensor is not None]
    results = []
    for fused in (False, True):
        product = SwiGLUFunction.apply(inner, bias, 2, fused)
        results.append([product.detach(), *torch.autograd.grad(product, inputs, grad)])
    for plain, fused in zip(*results):
        torch.testing.assert_close(fused, plain, atol=2e-6, rtol=1e-6)


def _mlp(mode: str, hidden: Tensor, first: Tensor, second: Tensor, calls: list[str]) -> Tensor:
    """GatedMLP's forward between two plain linears."""

    def linear(values: Tensor) -> tuple[Tensor, None]:
        calls.append("first")
        return F.linear(values, first), None

    layer = GatedMLPBetween(linear, lambda values: (F.linear(values, second), None), recompute=mode)
    return layer(hidden)[0]


def test_computed_again_gradients_are_the_same_and_the_first_product_is_taken_once_more():
    generator = torch.Generator().manual_seed(7)
    hidden, first, second = (
        torch.randn(*size, generator=generator, requires_grad=True)
        for size in ((ROWS, 1, 8), (2 * WIDTH, 8), (8, WIDTH))
    )
    found = {}
    for mode in ("none", "product", "inner"):
        calls: list[str] = []
        output = _mlp(mode, hidden, first, second, calls)
        found[mode] = torch.autograd.grad(output.square().sum(), (hidden, first, second))
        assert calls == ["first"] * (2 if mode == "inner" else 1), mode
    for mode in ("product", "inner"):
        for ours, kept in zip(found[mode], found["none"], strict=True):
            assert torch.equal(ours, kept), mode


def test_a_graph_may_be_gone_through_twice():
    hidden, first, second = torch.randn(ROWS, 1, 8), torch.randn(2 * WIDTH, 8), torch.randn(8, WIDTH)
    first.requires_grad_()
    output = _mlp("inner", hidden, first, second, []).sum()
    once = torch.autograd.grad(output, first, retain_graph=True)
    assert torch.equal(*once, *torch.autograd.grad(output, first))


def test_megatron_computes_again_what_transformer_engine_must_know_of():
    from megatron_papo.model.transformer_config import recompute_settings

    def chosen(spec: str, mode: str, *words: str, fp8: bool = False) -> dict[str, object]:
        config = load_config(None, [f"model.recompute={mode}", *words])
        return recompute_settings(config, spec, fp8=fp8)

    mlp = {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}
    assert chosen("transformer_engine", "mlp", fp8=True) == mlp
    overlap = ("parallel.tensor=2", "parallel.sequence=true", "parallel.overlap_tensor=true", "train.fixed_rows=true")
    assert chosen("transformer_engine", "mlp", *overlap) == mlp
    for spec, mode, fp8 in (("local", "mlp", True), ("transformer_engine", "mlp", False)):
        assert chosen(spec, mode, fp8=fp8) == {}
    assert chosen("transformer_engine", "selective", fp8=True) == {}
    assert chosen("local", "full")["recompute_granularity"] == "full"
