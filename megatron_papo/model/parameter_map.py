"""The two-way map between Hugging Face tensors and the shards of tensor ranks, and functions that build its entries.

`model/<family>/parameters.py` says which tensors make which parameter; `parameter_table` gives that table. Between
tensors and shards lies the *whole* parameter: what a single tensor rank would have, without padding.

    Hugging Face tensors  --runs of rows-->  whole parameter  --pieces of the axis-->  a rank's shard

Both arrows are index ranges, so each direction is the same copy with source and target exchanged. Padding that depends
on the number of ranks (vocabulary, FFN width) is zero, at the end of each part, and never leaves the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from megatron_papo.model.family import family_of
from megatron_papo.model.shape import LanguageShape, ModelShape

Index = tuple[slice, ...]
Read = Callable[[str, Index], Tensor]
"""(Hugging Face name, ranges along the leading axes) -> that part of the tensor."""


WORD_EMBEDDINGS = "language.embedding.word_embeddings.weight"
OUTPUT_LAYER = "language.output_layer.weight"
"""The two Megatron parameters with a row for every token of the vocabulary. Where they are tied, they are one."""


@dataclass(frozen=True)
class TensorSource:
    """A Hugging Face tensor, by the name that it has in published files."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class RowRange:
    """Rows `start : start + length` of the source with index `source`. The runs of an entry, one after the other, are
    the rows of its parameter."""

    source: int
    start: int
    length: int


@dataclass(frozen=True)
class ParameterEntry:
    """One Megatron parameter (layers counted over the whole model) and the Hugging Face tensors it is made of."""

    name: str
    sources: tuple[TensorSource, ...]
    runs: tuple[RowRange, ...]
    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    axis: int | None = None
    """The axis that is split over the tensor ranks; None: every rank has the whole parameter."""
    parts: int = 1
    """Number of equal parts of the axis, each of which is split by itself: 2 for gate and up, since a rank has a shard
    of each."""


@dataclass(frozen=True)
class ShardPiece:
    """`shard[local : local + length]` is `whole[start : start + length]`, along the entry's axis."""

    local: int
    start: int
    length: int


@dataclass(frozen=True)
class ShardBlock:
    """Says that `source_index` of the source with index `source` is the same values as `shard_index` of a shard."""

    source: int
    source_index: Index
    shard_index: Index


def pieces(entry: ParameterEntry, shard_shape: Sequence[int], rank: int) -> list[ShardPiece]:
    """The pieces of the whole parameter that make the shard of tensor rank `rank`, along the entry's axis (axis 0 of a
    replicated parameter). What no piece covers is padding."""
    if entry.axis is None:
        return [ShardPiece(0, 0, entry.shape[0])]
    each, whole = shard_shape[entry.axis] // entry.parts, entry.shape[entry.axis] // entry.parts
    start, stop = min(rank * each, whole), min((rank + 1) * each, whole)
    return [ShardPiece(part * each, part * whole + start, stop - start) for part in range(entry.parts) if stop > start]


def blocks(entry: ParameterEntry, shard_shape: Sequence[int], rank: int) -> Iterator[ShardBlock]:
    """Which part of which source is which part of rank `rank`'s shard."""
    held = pieces(entry, shard_shape, rank)
    if entry.axis == 1:
        rows = [ShardPiece(0, 0, entry.shape[0])]
        columns: list[tuple[Index, Index]] = [((_span(p.start, p.length),), (_span(p.local, p.length),)) for p in held]
    else:
        rows, columns = held, [((), ())]
    for span in rows:
        row = 0  # where the run begins in the whole parameter
        for run in entry.runs:
            start, stop = max(span.start, row), min(span.start + span.length, row + run.length)
            for in_source, in_shard in columns if stop > start else ():
                yield ShardBlock(
                    run.source,
                    (_span(run.start + start - row, stop - start), *in_source),
                    (_span(span.local + start - span.start, stop - start), *in_shard),
                )
            row += run.length


def _span(start: int, length: int) -> slice:
    return slice(start, start + length)


@torch.no_grad()
def fill_shard(entry: ParameterEntry, shard: Tensor, rank: int, read: Read) -> None:
    """Fills `shard`, that of tensor rank `rank`, from the Hugging Face tensors; reads only the values that it needs.

    Padding becomes zero. Values are cast to the shard's dtype.
    """
    shard.zero_()
    for block in blocks(entry, shard.shape, rank):
        part = read(entry.sources[block.source].name, block.source_index)
        target = shard[block.shard_index]
        target.copy_(part.reshape(target.shape))


def assemble(entry: ParameterEntry, shards: Sequence[Tensor]) -> list[Tensor]:
    """The full Hugging Face tensors, in the order of `entry.sources`, from the shards of all tensor ranks in their
    order.

    One shard is enough for a replicated parameter.
    """
    sources = [shards[0].new_empty(flat_shape(source.shape)) for source in entry.sources]
    for rank, shard in enumerate(shards[:1] if entry.axis is None else shards):
        for block in blocks(entry, shard.shape, rank):
            sources[block.source][block.source_index] = shard[block.shard_index]
    return [tensor.reshape(source.shape) for tensor, source in zip(sources, entry.sources)]


def flat_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a parameter for a tensor of `shape`: the convolution of the patch embedding becomes a matrix, each
    of its rows flattened."""
    return shape if len(shape) < 3 else (shape[0], math.prod(shape[1:]))


class ParametersModule(Protocol):
    """A family's module `parameters`: the two-way table between Hugging Face tensors and Megatron parameters."""

    EMBEDDING: str
    """Name of the word embedding in published files."""
    HEAD: str
    """Name of the output matrix in published files."""

    def entries(self, shape: ModelShape) -> Iterable[ParameterEntry]:
        """An entry for every parameter, in the model's order, with the names of published files. Where embeddings are
        tied, the output layer has no entry."""

    def published_name(self, name: str) -> str:
        """A Hugging Face name as in published files, from any form in which a file may have it."""

    def module_name(self, name: str) -> str:
        """A Hugging Face name as in the state of transformers' model, from any form."""


def parameter_names(shape: ModelShape) -> ParametersModule:
    """The names of Hugging Face tensors in the family of a model of `shape`."""
    return cast(ParametersModule, family_of(shape).module("parameters"))


def parameter_table(shape: ModelShape) -> dict[str, ParameterEntry]:
    """Every parameter of the model by Megatron name, in the model's order.

    With tied embeddings the output layer has no entry of its own, since it is the word embedding.
    """
    return {entry.name: entry for entry in parameter_names(shape).entries(shape)}


_TABLE_NAMES = {
    f"{linear}.layer_norm_weight": f"{norm}.weight"
    for linear, norm in (("self_attention.linear_qkv", "input_layernorm"), ("mlp.linear_fc1", "pre_mlp_layernorm"))
}
"""Transformer Engine fuses the two norms of a layer, where they have no bias, into the linear layers behind them."""


def table_name(name: str) -> str:
    """The parameter's name in the table, from its name under either layer spec. The table has the names of the local
    spec."""
    for fused, plain in _TABLE_NAMES.items():
        if name.endswith(fused):
            return name.removesuffix(fused) + plain
    return name


def plain_entry(name: str, source: str, shape: tuple[int, ...], axis: int | None = None) -> ParameterEntry:
    """An entry of one tensor as it is: replicated, or split along `axis` (0 for column-parallel, 1 for
    row-parallel)."""
    return ParameterEntry(name, (TensorSource(source, shape),), (RowRange(0, 0, shape[0]),), flat_shape(shape), axis)


def vocabulary_entry(name: str, source: str, shape: LanguageShape) -> ParameterEntry:
    """An entry of a matrix with a row for every token of the vocabulary, padded at its end."""
    return plain_entry(name, source, (shape.vocab_size, shape.hidden_size), axis=0)


def gated_entry(name: str, gate: str, up: str, width: int, rest: tuple[int, ...]) -> ParameterEntry:
    """An entry of a gated MLP's first layer, made of two tensors [width, *rest]: a rank has its shard of `gate`, then
    its shard of `up`."""
    sources = TensorSource(gate, (width, *rest)), TensorSource(up, (width, *rest))
    runs = RowRange(0, 0, width), RowRange(1, 0, width)
    return ParameterEntry(name, sources, runs, (2 * width, *rest), axis=0, parts=2)


def qkv_entry(name: str, sources: Sequence[str], shape: LanguageShape, rest: tuple[int, ...]) -> ParameterEntry:
    """An entry of queries, keys and values, made of three tensors, in Megatron's order: for each query group its
    queries, its key, its value. A rank has a contiguous share of the rows. With more ranks than groups that share ends
    inside a group, and Megatron gathers the rows at run time."""
    head, queries = shape.head_dim, shape.num_heads // shape.num_kv_heads * shape.head_dim
    rows = (shape.num_heads * head, shape.num_kv_heads * head, shape.num_kv_heads * head)
    runs = tuple(
        RowRange(source, group * length, length)
        for group in range(shape.num_kv_heads)
        for source, length in ((0, queries), (1, head), (2, head))
    )
    tensors = tuple(TensorSource(source, (length, *rest)) for source, length in zip(sources, rows, strict=True))
    return ParameterEntry(name, tensors, runs, (sum(rows), *rest), axis=0)


def fused_qkv_entry(name: str, source: str, num_heads: int, head_dim: int, rest: tuple[int, ...]) -> ParameterEntry:
    """An entry of one tensor with all queries, then all keys, then all values, whose heads have one width. In
    Megatron's order the query, key and value of each head lie together."""
    width = num_heads * head_dim
    runs = tuple(
        RowRange(0, part * width + head * head_dim, head_dim) for head in range(num_heads) for part in range(3)
    )
    return ParameterEntry(name, (TensorSource(source, (3 * width, *rest)),), runs, (3 * width, *rest), axis=0)
