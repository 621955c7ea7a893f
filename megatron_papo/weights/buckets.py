"""Parameters on their way from the shards of a model-parallel group to every rank of it, several at a time.

A bucket is a run of the name table's entries that one pipeline stage holds, of a bounded size. Its shards are laid end
to end and gathered over the tensor ranks in one exchange, put together to Hugging Face tensors, and sent along the
pipeline in another: what a norm's weight costs is mostly the exchange itself. A rank holds its shards and about three
buckets at a time, however large the model.
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
    stage: int
    entries: tuple[ParameterEntry, ...]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of its Hugging Face tensors, in order."""
        return [source.shape for entry in self.entries for source in entry.sources]


def make_buckets(table: Mapping[str, ParameterEntry], owner: Mapping[str, int], most_values: int) -> Iterator[Bucket]:
    """The entries in the table's order; a bucket has one stage and, unless it is a single entry, at most `most_values`
    values."""
    held: list[ParameterEntry] = []
    values = 0
    for name, entry in table.items():
        size = sum(math.prod(source.shape) for source in entry.sources)
        if held and (owner[held[0].name] != owner[name] or values + size > most_values):
            yield Bucket(owner[held[0].name], tuple(held))
            held, values = [], 0
        held.append(entry)
        values += size
    if held:
        yield Bucket(owner[held[0].name], tuple(held))


def gather_bucket(bucket: Bucket, held: Mapping[str, HeldParameter], like: Tensor, here: Layout) -> list[Tensor]:
    """The bucket's full Hugging Face tensors on every rank of the model-parallel group; a collective of it.

    Of the dtype and on the device of `like`. None shares the model's memory.
    """
    tensors = _assembled(bucket, held, here) if bucket.stage == here.pipeline_rank else None
    if here.pipeline_size == 1:
        assert tensors is not None
        return tensors
    sizes = [math.prod(shape) for shape in bucket.shapes]
    flat = (
        torch.empty(sum(sizes), dtype=like.dtype, device=like.device)
        if tensors is None
        else torch.cat([tensor.flatten() for tensor in tensors])
    )
    dist.broadcast(flat, src=dist.get_global_rank(here.pipeline_group, bucket.stage), group=here.pipeline_group)
    return [part.view(shape) for part, shape in zip(flat.split(sizes), bucket.shapes)]


def _assembled(bucket: Bucket, held: Mapping[str, HeldParameter], here: Layout) -> list[Tensor]:
    parts = [held[entry.name] for entry in bucket.entries]
    own = [part.tensor.detach() for part in parts]
    split = [place for place, part in enumerate(parts) if part.entry.axis is not None and here.tensor_size > 1]
    shards = [[tensor] for tensor in own]
    if split:
        ranks = _gather(torch.cat([own[place].flatten() for place in split]), here)
        for index, place in enumerate(split):
            start = sum(own[before].numel() for before in split[:index])
            shape = own[place].shape
            shards[place] = [flat[start : start + shape.numel()].view(shape) for flat in ranks]
    return [tensor for part, each in zip(parts, shards) for tensor in assemble(part.entry, each)]


def _gather(flat: Tensor, here: Layout) -> list[Tensor]:
    ranks = [torch.empty_like(flat) for _ in range(here.tensor_size)]
    dist.all_gather(ranks, flat, group=here.tensor_group)
    return ranks
