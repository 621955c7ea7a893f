"""The norm of the gradients, and clipping by it: one norm per update, and one value that is copied to the host.

These are the same operations, up to rounding, as those of `MegatronOptimizer.step` between `prepare_grads` and
`step_with_ready_grads`. They are written here for two reasons. Where Transformer Engine is not installed,
Megatron-Core's own norm copies a value to the host for every parameter. And Megatron's step computes the norm itself,
while the guard (`optimization/gradient_guard.py`) must know it before the step.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from torch import Tensor

from megatron_papo.distributed.accelerator import device

_EPSILON = 1e-6
"""Added to the norm before dividing by it, as in `megatron.core.optimizer.clip_grads`."""


def members(megatron: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers that Megatron chains into one; empty where a rank has no trainable parameters."""
    return list(megatron.chained_optimizers) if isinstance(megatron, ChainedOptimizer) else [megatron]


@torch.no_grad()
def gradient_norm(megatron: MegatronOptimizer) -> float:
    """The 2-norm of all gradients of the model; call after `prepare_grads`. Collective, and the same on all ranks."""
    return torch.stack([_sum_of_squares(member) for member in members(megatron)]).sum().item() ** 0.5


def _sum_of_squares(member: MegatronOptimizer) -> Tensor:
    """The squared norm of the gradients of one chained optimizer, over all ranks that share it. A parameter that
    several ranks hold is counted once."""
    gradients = member.get_grads_for_grad_norm()
    total = torch.nn.utils.get_total_norm(gradients) ** 2 if gradients else torch.zeros((), device=device())
    dist.all_reduce(total, group=member.get_grad_stats_parallel_group())
    return total


@torch.no_grad()
def clip_gradients(megatron: MegatronOptimizer, norm: float, max_norm: float) -> None:
    """Scales the gradients in place, from the norm `norm` to at most `max_norm`; with a `max_norm` of 0 they stay."""
    scale = max_norm / (norm + _EPSILON)
    if not 0.0 < scale < 1.0:
        return
    for member in members(megatron):
        # where the optimizer reads them: Adam with moments of another precision, and Adam on the host
        place = "decoupled_grad" if member.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 else "grad"
        each = [getattr(parameter, place, None) for parameter in member.get_parameters()]
        gradients = [gradient for gradient in each if gradient is not None]
        if gradients:
            torch._foreach_mul_(gradients, scale)
