"""The two kinds of norm: root-mean-square norm, which saves its input and one number per token, and layer norm.

The root-mean-square norm is computed in fp32, as transformers does in the models that have it. It is one autograd
function: with the formula written in torch, an fp32 copy of the input and the normed values in bfloat16 would stay
until backward, three times the size of the input. Its results differ from that formula in backward only, which is
computed in fp32 and rounded once. Suffixes: T tokens, H width.
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
    """Whether the linear layer after it computes the norm's output again in backward, instead of saving it."""

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
    """A weight that every tensor rank has whole. Under sequence parallelism each rank sees its own tokens, and
    Megatron-Core adds up the gradients of weights with this mark."""
    parameter: Any = torch.nn.Parameter(values)
    parameter.sequence_parallel = config.sequence_parallel
    return parameter


class LayerNorm(torch.nn.Module):
    """Layer norm with weight and bias; torch's own kernel saves the input and two numbers per token for backward."""

    computed_again: bool = False
    """Whether the linear layer after it computes the norm's output again in backward, instead of saving it."""

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
    """Root-mean-square norm [..., H] whose backward works from the input and one number per token."""

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
        if grad.is_cuda and grad.dtype == hidden.dtype == weight.dtype:  # one kernel, which computes in fp32
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
            # no matrix product, so that the result of a token does not depend on the other tokens
            along_T1 = (above * wide).mean(-1, keepdim=True)
            grad_hidden = torch.addcmul(grad * wide, normed, along_T1, value=-1).mul_(scale_T1).to(hidden.dtype)
        return grad_hidden, grad_weight, None


def _normed(hidden: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Values [..., H] normed in fp32 (or fp64), rounded to the input's dtype and then multiplied by the weight; and the
    factor of the norm, [..., 1]."""
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    normed, scale_T1 = torch.ops.aten._fused_rms_norm(wide, weight.shape, None, eps)
    return weight * normed.to(hidden.dtype), scale_T1


def _again(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _normed(hidden, weight, eps)[0]
