"""The state of Megatron's optimizers, parameter by parameter: moments, fp32 master copy, step.

It has one form for the fp32 optimizer, the mixed-precision one and the distributed one, so a checkpoint of any of them
loads into any other. Learning rates and weight decay are not state: the schedule sets them at each step. Megatron's own
`optimizer.sharded_state_dict` is not used: with torch's Adam the distributed optimizer's fails to load, and the
parameter groups that it stores are those of the first stage only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor

from megatron_papo.optimization.gradient_norm import members
from megatron_papo.weights.held import HeldParameter

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Slot:
    """What this rank's optimizer stores for one parameter, or for a flat range of one."""

    name: str
    held: HeldParameter
    main: Tensor
    """The tensor that the optimizer updates: the parameter itself, or its fp32 master copy."""
    state: dict[str, Tensor]
    flat_start: int | None
    """Where in the flattened parameter `main` begins, for the distributed optimizer; else None."""

    @property
    def has_master(self) -> bool:
        """Whether `main` is a copy of the parameter in another dtype."""
        return self.main.dtype != self.held.tensor.dtype


def slots(optimizer: MegatronOptimizer, held: Mapping[str, HeldParameter]) -> list[Slot]:
    """All slots of this rank; their states are empty before the first step."""
    names = {id(part.tensor): name for name, part in held.items()}
    result = []
    for inner in _inner(optimizer):
        for parameter, updated, flat_start in _mains(inner):
            name, state = names[id(parameter)], inner.optimizer.state[updated]
            # the precision-aware and the offloading Adam store the master copy as state of the weight itself
            main = state.get("master_param", updated)
            result.append(Slot(name, held[name], main, state, flat_start))
    return result


def step_count(optimizer: MegatronOptimizer) -> int:
    """The number of updates that the optimizer has made, as Adam's bias correction counts them; 0 on a rank without
    parameters."""
    counts = [0]
    for adam in (adam for inner in _inner(optimizer) for adam in _adams(inner)):
        steps = [state["step"] for state in adam.state.values() if "step" in state]
        if steps:
            counts.append(int(torch.stack(steps).max()))  # one copy to the host for each Adam
        counts += [int(group["step"]) for group in adam.param_groups if "step" in group]
    return max(counts)


def clear(optimizer: MegatronOptimizer) -> None:
    """Brings the optimizer back to before its first update. Master copies keep their values, except those that are
    state of the weights."""
    for inner in _inner(optimizer):
        for adam in (inner.optimizer, *_adams(inner)):
            adam.state.clear()
            for group in adam.param_groups:
                group.pop("step", None)


def allocate(optimizer: MegatronOptimizer, step: int) -> None:
    """Gives every parameter zero moments and the step count, as if `step` updates had been made."""
    for inner in _inner(optimizer):
        if isinstance(inner.optimizer, HybridDeviceOptimizer):
            _step_in_place(inner.optimizer)
        elif inner.config.use_precision_aware_optimizer:
            _initialize(inner.optimizer)
        else:
            inner.init_state_fn(inner.optimizer, inner.config)
        for adam in _adams(inner):
            for state in adam.state.values():
                for moment in MOMENTS:
                    state[moment].zero_()
            _count_from(adam, step)


def _inner(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers of the chain that update parameters; for a rank without parameters Megatron makes a stub."""
    return [inner for inner in members(optimizer) if inner.optimizer is not None]


def _adams(inner: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    """The optimizers that count steps: the Adam itself, or those that an offloading Adam is made of, one on the GPU and
    many on the host. Before each step these receive the groups of the offloading Adam, so a count in its groups would
    come back every time."""
    adam = inner.optimizer
    return adam.sub_optimizers if isinstance(adam, HybridDeviceOptimizer) else [adam]


def _step_in_place(adam: HybridDeviceOptimizer) -> None:
    """An update at a learning rate of 0: it creates the states and moves no weight. Padding has to stay zero, and no
    checkpoint has it."""
    rates = [group["lr"] for group in adam.param_groups]
    for group in adam.param_groups:
        group["lr"] = 0.0
    adam.dummy_step()
    for group, rate in zip(adam.param_groups, rates):
        group["lr"] = rate


def _initialize(adam: Any) -> None:
    """Creates the states of Transformer Engine's FusedAdam as Megatron-Core 0.19.2 does. Since 2.1 its method takes a
    second argument: whether the master copy is stored as the bits that bfloat16 leaves out."""
    for parameter in (parameter for group in adam.param_groups for parameter in group["params"]):
        if not adam.state[parameter]:
            adam.initialize_state(parameter, adam.store_param_remainders and parameter.dtype == torch.bfloat16)


def _count_from(adam: torch.optim.Optimizer, step: int) -> None:
    """Sets the count such that the next update is number `step` + 1. Torch's Adam counts in every state, on the host
    or, with its fused kernel, beside the moments; the fused Adams of other libraries count in the group."""
    for group in adam.param_groups:
        if not isinstance(adam, torch.optim.Adam):
            group["step"] = step
            continue
        for parameter in group["params"]:
            place = parameter.device if group["fused"] or group["capturable"] else "cpu"
            adam.state[parameter]["step"] = torch.full((), float(step), device=place)


def _mains(inner: MegatronOptimizer) -> Iterator[tuple[Tensor, Tensor, int | None]]:
    """Yields each model parameter, the tensor that the optimizer updates for it, and where in the flattened parameter
    that tensor begins (None: it is whole)."""
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
