"""Megatron-Core's parallel linear layers with operands rounded to FP8: they emulate Transformer Engine on any device.

They serve proofs and measurements of what FP8 does to a model, and are slower than layers that do not round. Inputs,
weights and gradients are rounded as `rounding.py` says, and products are taken in float32. Communication is Megatron's
own: what it exchanges is not rounded. Biases are added in model.dtype, and their gradients are sums of gradients that
are not rounded, as in Transformer Engine.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_papo.model.fp8.rounding import Operands
from megatron_papo.model.recompute import by_recipe


class RoundedColumnLinear(ColumnParallelLinear):
    """A column-parallel linear layer that rounds its operands where `operands` is set and `rounds` is on."""

    operands: Operands | None = None
    rounds: bool = False

    def forward(self, input_: Tensor, *args: Any, **how: Any) -> tuple[Tensor, Tensor | None]:
        """Backward keeps the recipe of the input instead of the input, where it has one (`model/recompute.py`)."""
        with by_recipe(input_):
            return super().forward(input_, *args, **how)

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None, **how: Any) -> Tensor:
        if self.operands is None or not self.rounds:
            return super()._forward_impl(input=input, weight=weight, bias=bias, **how)
        if how["sequence_parallel"]:  # gathered before rounding, so that the maximum is that of all tokens
            input = gather_from_sequence_parallel_region(input, group=how["tp_group"])
        elif how["allreduce_dgrad"]:
            input = copy_to_tensor_model_parallel_region(input, group=how["tp_group"])
        output = RoundedProduct.apply(input, weight, self.operands)
        return output if bias is None else output + bias


class RoundedRowLinear(RowParallelLinear):
    """The same for a row-parallel layer. Its input, and so the input's maximum, is this rank's share of the width."""

    operands: Operands | None = None
    rounds: bool = False

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None, **how: Any) -> Tensor:
        if self.operands is None or not self.rounds:
            return super()._forward_impl(input=input, weight=weight, bias=bias, **how)
        assert bias is None, "Megatron adds a row-parallel bias after the sum over ranks"
        return RoundedProduct.apply(input, weight, self.operands)


class RoundedProduct(torch.autograd.Function):
    """The product of an input [..., in] with the transpose of a weight [out, in], all operands rounded."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, operands: Operands) -> Tensor:
        input_TC = input.reshape(-1, input.shape[-1])
        # saved, since later micro-batches may change the scales before backward
        scales = operands.scale("input", input_TC), operands.scale("weight", weight)
        ctx.save_for_backward(input, weight)
        ctx.operands, ctx.scales = operands, scales
        output = operands.round("input", input_TC, 1, scales[0]) @ operands.round("weight", weight, 1, scales[1]).T
        return output.to(input.dtype).view(*input.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        input, weight = ctx.saved_tensors
        operands, (input_scale, weight_scale) = ctx.operands, ctx.scales
        grad_TR, input_TC = grad.reshape(-1, grad.shape[-1]), input.reshape(-1, input.shape[-1])
        scale = operands.scale("gradient", grad_TR)
        grad_input = grad_weight = None
        if ctx.needs_input_grad[0]:
            weight_RC = operands.round("weight", weight, 0, weight_scale)
            grad_input = (operands.round("gradient", grad_TR, 1, scale) @ weight_RC).to(input.dtype).view_as(input)
        if ctx.needs_input_grad[1]:
            columns_TC = operands.round("input", input_TC, 0, input_scale)
            grad_weight = (operands.round("gradient", grad_TR, 0, scale).T @ columns_TC).to(weight.dtype)
        return grad_input, grad_weight, None


RoundedLinear = RoundedColumnLinear | RoundedRowLinear
