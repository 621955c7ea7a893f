"""The few exchanges of values (metrics, log-probs) that stages of a step need between ranks.

Gradients and activations travel inside Megatron-Core.
"""

from __future__ import annotations

import math
import os
import socket
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_papo.distributed.layout import layout, world_group
from megatron_papo.types import Metrics


def broadcast_from_last_stage(tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The last pipeline stage's tensor, on every stage of the pipeline; other stages may pass None.

    Every stage knows `shape` and `dtype`. No gradient flows.
    """
    own = layout()
    if own.is_last_stage:
        assert tensor is not None, "the last stage has the tensor"
        tensor = tensor.detach().contiguous()
        assert tuple(tensor.shape) == shape and tensor.dtype == dtype
        if own.pipeline_size == 1:
            return tensor
    else:
        tensor = torch.empty(shape, dtype=dtype, device=_device())
    source = dist.get_global_rank(own.pipeline_group, own.pipeline_size - 1)
    dist.broadcast(tensor, src=source, group=own.pipeline_group)
    return tensor


def gather_objects(obj: Any, group: dist.ProcessGroup) -> list[Any]:
    """Every rank's `obj`, by rank of the group, on every rank of the group; anything that pickles."""
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, obj, group=group)
    return gathered


def share_of_cores() -> int:
    """How many cores this rank may keep busy: those that it may run on (`taskset`, Slurm's binding), each divided by
    the ranks of the machine that may run on it too; at least one. Collective over all ranks."""
    host, own = socket.gethostname(), os.sched_getaffinity(0)
    users = Counter(
        core for name, cores in gather_objects((host, own), world_group()) if name == host for core in cores
    )
    return max(1, int(sum(Fraction(1, users[core]) for core in own)))


def any_rank(value: bool) -> bool:
    """Whether `value` is true on any rank of the world. Collective; the result is the same on every rank."""
    largest = torch.tensor(int(value), device=_device())
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return bool(largest.item())


def move_items(items: Sequence[Any], moves: Sequence[tuple[int, int, int]], group: dist.ProcessGroup) -> list[Any]:
    """This rank's items without those it gives away, followed by those it is given; anything that pickles.

    `moves`: (rank of the group that gives, place among its items, rank that receives), equal on every rank. Items
    are sent one at a time and from rank to rank, so that no third rank ever has a copy.
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


def merge_metric(name: str, one: tuple[float, float] | None, other: tuple[float, float]) -> tuple[float, float]:
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
    own = layout()
    totals: Metrics = {}
    for part in gather_objects(metrics, own.data_group):
        for name, (numerator, count) in part.items():
            totals[name] = merge_metric(name, totals.get(name), (float(numerator), float(count)))
    summed: list[Any] = [dict(sorted(totals.items()))]
    if own.pipeline_size > 1:
        source = dist.get_global_rank(own.pipeline_group, own.pipeline_size - 1)
        dist.broadcast_object_list(summed, src=source, group=own.pipeline_group)
    return summed[0]


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
