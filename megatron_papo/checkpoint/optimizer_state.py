"""The state of Megatron's optimizers, parameter by parameter: moments, fp32 master copy, step.

The same for the fp32 optimizer, the mixed-precision one and the distributed one, so a checkpoint of any of them loads
into any other. Learning rates and weight decay are not state: the schedule sets them at each step. Megatron's own
`optimizer.sharded_state_dict` is not used: with torch's Adam the distributed optimizer's fails to load, and the
parameter groups that it stores are those of the first stage only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor

from megatron_papo.checkpoint.parameters import Held

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Slot:
    """What the optimizer of this rank keeps for one parameter, or for a flat range of one."""

    name: str
    held: Held
    main: Tensor
    """What the optimizer updates: the parameter itself, or its fp32 master copy."""
    state: dict[str, Tensor]
    flat_start: int | None
    """Of the distributed optimizer: where in the flattened parameter `main` begins."""

    @property
    def has_master(self) -> bool:
        return self.main.dtype != self.held.tensor.dtype


def slots(optimizer: MegatronOptimizer, held: Mapping[str, Held]) -> list[Slot]:
    """Every slot of this rank; their states are empty before the first step."""
    names = {id(part.tensor): name for name, part in held.items()}
    found = []
    for inner in _inner(optimizer):
        for parameter, updated, flat_start in _mains(inner):
            name, state = names[id(parameter)], inner.optimizer.state[updated]
            # the precision-aware and the offloading Adam keep the master copy as state of the weight itself
            main = state.get("master_param", updated)
            found.append(Slot(name, held[name], main, state, flat_start))
    return found


def step_count(optimizer: MegatronOptimizer) -> int:
    """Updates that the optimizer has made, as Adam's bias correction counts them; 0 on a rank without parameters."""
    counts = [0]
    for inner in _inner(optimizer):
        counts += [int(state["step"]) for state in inner.optimizer.state.values() if "step" in state]
        counts += [int(group["step"]) for group in inner.optimizer.param_groups if "step" in group]
    return max(counts)


def allocate(optimizer: MegatronOptimizer, step: int) -> None:
    """Gives every parameter zero moments and the step count, as if `step` updates had been made."""
    for inner in _inner(optimizer):
        if isinstance(inner.optimizer, HybridDeviceOptimizer):
            inner.optimizer.dummy_step()  # moves weights too; the caller loads them afterwards
        else:
            inner.init_state_fn(inner.optimizer, inner.config)
        for state in inner.optimizer.state.values():
            for moment in MOMENTS:
                state[moment].zero_()
            # of torch's Adam and AdamW, of the latter on the host too; the fused Adams count in the group
            if isinstance(inner.optimizer, torch.optim.Adam) or "step" in state:
                state["step"] = torch.tensor(float(step))
        if not isinstance(inner.optimizer, torch.optim.Adam):
            for group in inner.optimizer.param_groups:
                group["step"] = step


def _inner(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """Megatron chains optimizers; those without parameters are stubs."""
    chain = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    return [inner for inner in chain if inner.optimizer is not None]


def _mains(inner: MegatronOptimizer) -> Iterator[tuple[Tensor, Tensor, int | None]]:
    """(model parameter, what the optimizer updates for it, flat start of that)."""
    if isinstance(inner, DistributedOptimizer):
        groups = inner.optimizer.param_groups
        for buffer in inner.gbuf_ranges:
            for bucket in (bucket for buckets in buffer.values() for bucket in buckets):
                for parameter, ranges in bucket["param_map"].items():
                    group, place = inner.model_param_group_index_map[parameter]
                    yield parameter, groups[group]["params"][place], ranges["param"].start
    elif isinstance(inner, Float16OptimizerWithFloat16Params):
        for parameters, mains in (
            *zip(inner.float16_groups, inner.fp32_from_float16_groups),
            *zip(inner.fp32_from_fp32_groups, inner.fp32_from_fp32_groups),
        ):
            yield from ((parameter, main, None) for parameter, main in zip(parameters, mains))
    else:
        yield from ((parameter, parameter, None) for parameter in inner.get_parameters())
