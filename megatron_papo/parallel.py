"""Process groups from the settings, and the few exchanges that stages of a step need between ranks.

Ranks are laid out by Megatron-Core's `parallel_state`: tensor fastest, then data, then pipeline. The exchanges are
for values (metrics, log-probs); gradients and activations travel inside Megatron-Core. On a machine without a GPU
call `accelerator.adapt_megatron` first.
"""

from __future__ import annotations

import datetime
import itertools
import math
import os
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_papo.config import ParallelConfig
from megatron_papo.rendezvous import world_store
from megatron_papo.types import Metrics


@dataclass(frozen=True)
class Layout:
    """Where this rank stands, and the groups it belongs to."""

    rank: int
    world_size: int
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    data_rank: int
    data_size: int
    tensor_group: dist.ProcessGroup
    pipeline_group: dist.ProcessGroup
    data_group: dist.ProcessGroup
    model_group: dist.ProcessGroup
    """All ranks that together hold one copy of the model: tensor x pipeline."""

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline_size - 1


_layout: Layout | None = None
_worlds = itertools.count()
"""Of this process: a second world finds nothing of the first in the store."""


def initialize(parallel: ParallelConfig, num_engine_ranks: int = 0) -> Layout:
    """Starts torch.distributed (from RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) and Megatron's groups.

    A process that was started alone, without these, becomes rank 0 of 1. A process group that exists already is
    used. The last `num_engine_ranks` of those that were started belong to separate engines and not to this world.
    Raises ValueError when the world does not divide by tensor x pipeline.
    """
    global _layout
    if not dist.is_initialized():
        _start_process_group(parallel.timeout_s, num_engine_ranks)
    world_size, model_size = dist.get_world_size(), parallel.tensor * parallel.pipeline
    if world_size % model_size:
        raise ValueError(
            f"{world_size} ranks do not divide by parallel.tensor {parallel.tensor} "
            f"x parallel.pipeline {parallel.pipeline}"
        )
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        distributed_timeout_minutes=math.ceil(parallel.timeout_s / 60),
    )
    _layout = Layout(
        rank=dist.get_rank(),
        world_size=world_size,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel.tensor,
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=parallel.pipeline,
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=world_size // model_size,
        tensor_group=parallel_state.get_tensor_model_parallel_group(),
        pipeline_group=parallel_state.get_pipeline_model_parallel_group(),
        data_group=parallel_state.get_data_parallel_group(),
        model_group=parallel_state.get_model_parallel_group(),
    )
    return _layout


def layout() -> Layout:
    """The layout that `initialize` made."""
    assert _layout is not None, "initialize() comes first"
    return _layout


def own_rank() -> int:
    """This process's rank in the world, before `initialize` too."""
    return int(os.environ.get("RANK", "0"))


def place_among_engines(num_engine_ranks: int) -> int | None:
    """This process's place among the last `num_engine_ranks` of those that were started; None on the trainer's."""
    first = int(os.environ.get("WORLD_SIZE", "1")) - num_engine_ranks
    return own_rank() - first if num_engine_ranks and own_rank() >= first else None


def shutdown() -> None:
    """Ends the process groups; harmless when there are none."""
    global _layout
    if dist.is_initialized():
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    _layout = None


def broadcast_from_last_stage(tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The last pipeline stage's tensor, on every stage of the pipeline; other stages may pass None.

    Every stage knows `shape` and `dtype`. No gradient flows.
    """
    here = layout()
    if here.is_last_stage:
        assert tensor is not None, "the last stage has the tensor"
        tensor = tensor.detach().contiguous()
        assert tuple(tensor.shape) == shape and tensor.dtype == dtype
        if here.pipeline_size == 1:
            return tensor
    else:
        tensor = torch.empty(shape, dtype=dtype, device=_device())
    source = dist.get_global_rank(here.pipeline_group, here.pipeline_size - 1)
    dist.broadcast(tensor, src=source, group=here.pipeline_group)
    return tensor


def gather_objects(obj: Any, group: dist.ProcessGroup) -> list[Any]:
    """Every rank's `obj`, by rank of the group, on every rank of the group; anything that pickles."""
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, obj, group=group)
    return gathered


def everyone() -> dist.ProcessGroup:
    """All ranks of the world."""
    group = dist.group.WORLD
    assert group is not None
    return group


def share_of_cores() -> int:
    """How many cores this rank may keep busy: those that it may run on (`taskset`, Slurm's binding), each divided by
    the ranks of the machine that may run on it too; at least one. Collective over all ranks."""
    host, own = socket.gethostname(), os.sched_getaffinity(0)
    users = Counter(core for name, cores in gather_objects((host, own), everyone()) if name == host for core in cores)
    return max(1, int(sum(Fraction(1, users[core]) for core in own)))


def any_rank(value: bool) -> bool:
    """Whether `value` holds on any rank of the world; every rank calls it and hears the same."""
    found = torch.tensor(int(value), device=_device())
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found.item())


def move_items(items: Sequence[Any], moves: Sequence[tuple[int, int, int]], group: dist.ProcessGroup) -> list[Any]:
    """This rank's items without those it gives away, followed by those it is given; anything that pickles.

    `moves`: (rank of the group that gives, place among its items, rank that receives), equal on every rank. One at a
    time and from rank to rank, so that no other rank ever holds what is moved.
    """
    own = dist.get_rank(group)
    kept: dict[int, Any] = dict(enumerate(items))
    received = []
    for source, place, target in moves:
        if own == source:
            dist.send_object_list([kept.pop(place)], group=group, group_dst=target)
        elif own == target:
            box: list[Any] = [None]
            dist.recv_object_list(box, group=group, group_src=source)
            received += box
    return [*kept.values(), *received]


def larger(one: float, other: float) -> float:
    """The larger of two, NaN where either is: Python's `max` keeps a NaN or drops it by their order."""
    return one if math.isnan(one) or one >= other else other


def joined(name: str, one: tuple[float, float] | None, other: tuple[float, float]) -> tuple[float, float]:
    """Two parts of a metric as one: sums, and of a name that ends in `_max` the larger."""
    if one is None:
        return other
    if name.endswith("_max"):
        return larger(one[0], other[0]), max(one[1], other[1])
    return one[0] + other[0], one[1] + other[1]


def sum_metrics(metrics: Metrics) -> Metrics:
    """Numerators and counts summed over the data-parallel ranks, as the last pipeline stage has them; maxima stay so.

    Every rank of the world gets the same result, whatever it passed itself; a name may be missing on some ranks.
    """
    here = layout()
    totals: Metrics = {}
    for part in gather_objects(metrics, here.data_group):
        for name, (numerator, count) in part.items():
            totals[name] = joined(name, totals.get(name), (float(numerator), float(count)))
    summed: list[Any] = [dict(sorted(totals.items()))]
    if here.pipeline_size > 1:
        source = dist.get_global_rank(here.pipeline_group, here.pipeline_size - 1)
        dist.broadcast_object_list(summed, src=source, group=here.pipeline_group)
    return summed[0]


def _start_process_group(timeout_s: float, num_engine_ranks: int) -> None:
    timeout = datetime.timedelta(seconds=timeout_s)
    num_ranks = int(os.environ.get("WORLD_SIZE", "1")) - num_engine_ranks
    if num_ranks < 1:
        raise ValueError(
            f"generation.placement=separate: {num_ranks + num_engine_ranks} ranks, generation.engines x "
            f"generation.tensor = {num_engine_ranks} of them for engines, leave none to train"
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    own = dist.PrefixStore(f"trainer_{next(_worlds)}", world_store(timeout_s))
    dist.init_process_group(backend, store=own, rank=own_rank(), world_size=num_ranks, timeout=timeout)


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
