"""The two kinds of norm: root-mean-square, which keeps its input and one number a token for backward, and layer norm.

The former is computed in fp32, as transformers does in the models that have it. Written as one autograd function: of
the formula as torch differentiates it, an fp32 copy of the input and the normed values in bfloat16 would stay until
backward, three times the input. Departs from that in backward alone: it is computed in fp32 and rounded once. Suffixes:
T tokens, H width.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_papo.model.recompute import with_recipe


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last axis, with a weight."""

    computed_again: bool = False
    """Whether a linear layer behind it computes its output again in backward."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float):
        super().__init__()
        self.hidden_size, self.eps = hidden_size, eps
        ones = torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight = replicated_parameter(ones, config)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden.contiguous()  # a view, of one part of queries and keys, would keep all of it for backward
        normed: Tensor = RMSNormFunction.apply(hidden, self.weight, self.eps)
        if not self.computed_again:
            return normed
        return with_recipe(normed, partial(_again, hidden.detach(), self.weight, self.eps))


def replicated_parameter(values: Tensor, config: TransformerConfig) -> torch.nn.Parameter:
    """A weight that every tensor rank holds whole. Under sequence parallelism each rank sees its own tokens, and
    Megatron-Core adds up the gradients of weights with this mark."""
    parameter: Any = torch.nn.Parameter(values)
    parameter.sequence_parallel = config.sequence_parallel
    return parameter


class LayerNorm(torch.nn.Module):
    """Layer norm with weight and bias; torch's own kernel keeps the input and two numbers a token for backward."""

    computed_again: bool = False
    """Whether a linear layer behind it computes its output again in backward."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float):
        super().__init__()
        self.hidden_size, self.eps = hidden_size, eps
        place: dict[str, Any] = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        self.weight = replicated_parameter(torch.ones(hidden_size, **place), config)
        self.bias = replicated_parameter(torch.zeros(hidden_size, **place), config)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden.contiguous()  # as in `RMSNorm`
        again = partial(F.layer_norm, normalized_shape=(self.hidden_size,), weight=self.weight, bias=self.bias)
        normed = again(hidden, eps=self.eps)
        return with_recipe(normed, partial(again, hidden.detach(), eps=self.eps)) if self.computed_again else normed


class RMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        output, scale_T1 = _normed(hidden, weight, eps)
        ctx.save_for_backward(hidden, weight, scale_T1)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, scale_T1 = ctx.saved_tensors
        wants_hidden, wants_weight, _ = ctx.needs_input_grad
        if grad.is_cuda and grad.dtype == hidden.dtype == weight.dtype:  # one kernel, in fp32 within
            return *torch.ops.aten._fused_rms_norm_backward(
                grad, hidden, weight.shape, scale_T1, weight, [wants_hidden, wants_weight]
            ), None
        normed = hidden * scale_T1
        above = grad * normed
        grad_hidden = grad_weight = None
        if wants_weight:
            grad_weight = above.flatten(0, -2).sum(0).to(weight.dtype)
        if wants_hidden:
            wide = weight.to(normed.dtype)
            along_T1 = (above * wide).mean(-1, keepdim=True)  # no product of matrices: a token's bits are its own
            grad_hidden = torch.addcmul(grad * wide, normed, along_T1, value=-1).mul_(scale_T1).to(hidden.dtype)
        return grad_hidden, grad_weight, None


def _normed(hidden: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """[..., H] normed in fp32 (fp64 stays), rounded to the input's dtype and then times the weight; and what the norm
    multiplies by, [..., 1]."""
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    normed, scale_T1 = torch.ops.aten._fused_rms_norm(wide, weight.shape, None, eps)
    return weight * normed.to(hidden.dtype), scale_T1


def _again(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _normed(hidden, weight, eps)[0]
