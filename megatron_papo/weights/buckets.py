"""Gathers parameters from the shards of a model-parallel group on every rank of it, several parameters at a time.

A bucket is a run of neighbouring entries of the parameter table that are on one pipeline stage, of a bounded size. Its
shards are laid end to end and gathered over the tensor ranks in one exchange, joined to Hugging Face tensors, and sent
along the pipeline in a second exchange. Buckets exist since for a small parameter, such as a norm's weight, the
exchange itself takes most of the time. A rank has its shards and about three buckets in memory, however large the
model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_papo.distributed.layout import Layout
from megatron_papo.model.parameter_map import ParameterEntry, assemble
from megatron_papo.weights.held import HeldParameter


@dataclass(frozen=True)
class Bucket:
    """Parameters of one pipeline stage that are exchanged together."""

    stage: int
    entries: tuple[ParameterEntry, ...]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of its Hugging Face tensors, in order."""
        return [source.shape for entry in self.entries for source in entry.sources]


def make_buckets(table: Mapping[str, ParameterEntry], owner: Mapping[str, int], most_values: int) -> Iterator[Bucket]:
    """Buckets of the entries in the table's order. `owner` is the pipeline stage of each parameter. A bucket has at
    most `most_values` values, unless it is a single entry."""
    collected: list[ParameterEntry] = []
    values = 0
    for name, entry in table.items():
        size = sum(math.prod(source.shape) for source in entry.sources)
        if collected and (owner[collected[0].name] != owner[name] or values + size > most_values):
            yield Bucket(owner[collected[0].name], tuple(collected))
            collected, values = [], 0
        collected.append(entry)
        values += size
    if collected:
        yield Bucket(owner[collected[0].name], tuple(collected))


def gather_bucket(bucket: Bucket, own: Mapping[str, HeldParameter], like: Tensor, ranks: Layout) -> list[Tensor]:
    """The bucket's full Hugging Face tensors, on every rank of the model-parallel group. All its ranks must call this.

    `own`: this rank's parameters by Megatron name. The tensors have the dtype and device of `like`; none shares memory
    with the model.
    """
    tensors = _assembled(bucket, own, ranks) if bucket.stage == ranks.pipeline_rank else None
    if ranks.pipeline_size == 1:
        assert tensors is not None
        return tensors
    sizes = [math.prod(shape) for shape in bucket.shapes]
    flat = (
        torch.empty(sum(sizes), dtype=like.dtype, device=like.device)
        if tensors is None
        else torch.cat([tensor.flatten() for tensor in tensors])
    )
    dist.broadcast(flat, src=dist.get_global_rank(ranks.pipeline_group, bucket.stage), group=ranks.pipeline_group)
    return [part.view(shape) for part, shape in zip(flat.split(sizes), bucket.shapes)]


def _assembled(bucket: Bucket, own: Mapping[str, HeldParameter], ranks: Layout) -> list[Tensor]:
    """The bucket's full tensors, from the shards of the tensor ranks of its stage."""
    parts = [own[entry.name] for entry in bucket.entries]
    tensors = [part.tensor.detach() for part in parts]
    split = [place for place, part in enumerate(parts) if part.entry.axis is not None and ranks.tensor_size > 1]
    shards = [[tensor] for tensor in tensors]
    if split:
        gathered = _gather(torch.cat([tensors[place].flatten() for place in split]), ranks)
        for index, place in enumerate(split):
            start = sum(tensors[before].numel() for before in split[:index])
            shape = tensors[place].shape
            shards[place] = [flat[start : start + shape.numel()].view(shape) for flat in gathered]
    return [tensor for part, each in zip(parts, shards) for tensor in assemble(part.entry, each)]


def _gather(flat: Tensor, ranks: Layout) -> list[Tensor]:
    gathered = [torch.empty_like(flat) for _ in range(ranks.tensor_size)]
    dist.all_gather(gathered, flat, group=ranks.tensor_group)
    return gathered
