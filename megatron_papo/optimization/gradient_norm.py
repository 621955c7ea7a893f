"""The norm of the gradients, and clipping by it: one norm an update, and one value that is copied to the host.

What `MegatronOptimizer.step` does between `prepare_grads` and `step_with_ready_grads`, to rounding. Megatron-Core's
own norm asks the device for a value for every parameter where Transformer Engine is not installed, and its step takes
the norm anew, of which the guard (`optimization/gradient_guard.py`) has to know beforehand.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from torch import Tensor

from megatron_papo.distributed.accelerator import device

_EPSILON = 1e-6
"""As in `megatron.core.optimizer.clip_grads`."""


def members(megatron: MegatronOptimizer) -> list[MegatronOptimizer]:
    """Megatron chains optimizers; those of ranks without trainable parameters have none inside."""
    return list(megatron.chained_optimizers) if isinstance(megatron, ChainedOptimizer) else [megatron]


@torch.no_grad()
def gradient_norm(megatron: MegatronOptimizer) -> float:
    """The 2-norm of all gradients of the model, after `prepare_grads`; collective, the same on all ranks."""
    return torch.stack([_sum_of_squares(member) for member in members(megatron)]).sum().item() ** 0.5


def _sum_of_squares(member: MegatronOptimizer) -> Tensor:
    """Over all ranks; a parameter that several ranks hold is counted once."""
    gradients = member.get_grads_for_grad_norm()
    total = torch.nn.utils.get_total_norm(gradients) ** 2 if gradients else torch.zeros((), device=device())
    dist.all_reduce(total, group=member.get_grad_stats_parallel_group())
    return total


@torch.no_grad()
def clip_gradients(megatron: MegatronOptimizer, norm: float, max_norm: float) -> None:
    """Scales the gradients, whose norm is `norm`, in place so that it is at most `max_norm`; 0: leaves them."""
    scale = max_norm / (norm + _EPSILON)
    if not 0.0 < scale < 1.0:
        return
    for member in members(megatron):
        # where the optimizer reads them: Adam with moments of another precision, and Adam on the host
        place = "decoupled_grad" if member.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 else "grad"
        found = [getattr(parameter, place, None) for parameter in member.get_parameters()]
        gradients = [gradient for gradient in found if gradient is not None]
        if gradients:
            torch._foreach_mul_(gradients, scale)
