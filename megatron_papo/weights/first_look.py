"""A cheap look at what was loaded, in every verb that loads a Hugging Face folder, before anything is done with it.

The certificate compares forward passes and belongs to training; this compares the weights themselves with transformers'
own reading of the folder: which files it resolves to, which parameters of which shapes its model has by its own reading
of config.json, and three rows of every parameter that this rank holds, read anew from the files that transformers
names. Rows and not whole tensors: what was just read is not read again (docs/models.md has what the look costs). Leaves
out what only a forward pass shows.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from megatron_papo.generation.reference_model import expected_shapes, read_config
from megatron_papo.model.family import family_of
from megatron_papo.model.parameter_map import ParameterEntry, ShardBlock, blocks, parameter_names, parameter_table
from megatron_papo.model.shape import ModelShape
from megatron_papo.weights.held import HeldParameter
from megatron_papo.weights.weight_files import weight_files


def look(folder: Path, shape: ModelShape, held: Mapping[str, HeldParameter], tensor_rank: int) -> None:
    """Raises ValueError naming what transformers reads otherwise. `held`: this rank's parameters, as they were loaded
    from `folder`."""
    files = files_of_transformers(folder)
    _compare_files(folder, files)
    _compare_names(folder, shape)
    _compare_rows(files, shape, held, tensor_rank)


def files_of_transformers(folder: Path) -> list[Path]:
    """The files that its `from_pretrained` would read. The function is its own and private, so its arguments are
    asked for by name; the tests hold both tested versions to it."""
    from transformers.modeling_utils import _get_resolved_checkpoint_files as resolve

    known: dict[str, Any] = {
        "pretrained_model_name_or_path": str(folder), "variant": None, "gguf_file": None, "use_safetensors": True,
        "user_agent": None, "is_remote_code": False, "transformers_explicit_filename": None,
        "download_kwargs": {"local_files_only": True},
    }  # fmt: skip
    wanted = inspect.signature(resolve).parameters
    try:
        found, _ = resolve(**{name: value for name, value in known.items() if name in wanted})
    except Exception as error:  # of any type, by what transformers stumbles over
        raise ValueError(f"{folder}: transformers finds no weights: {type(error).__name__}: {error}") from error
    return [Path(file) for file in found or []]


def _compare_files(folder: Path, files: list[Path]) -> None:
    ours, theirs = ({file.name for file in each} for each in (weight_files(folder).files, files))
    if ours != theirs:
        raise ValueError(f"{folder}: read from {', '.join(sorted(ours))}, by transformers {', '.join(sorted(theirs))}")


def _compare_names(folder: Path, shape: ModelShape) -> None:
    names = parameter_names(shape)
    ours = {
        names.module_name(source.name): source.shape
        for entry in parameter_table(shape).values()
        for source in entry.sources
    }
    theirs = expected_shapes(read_config(folder, family_of(shape)))
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise ValueError(f"{folder}: {name}: {ours.get(name)} here, {theirs.get(name)} in transformers' model")


def _compare_rows(files: list[Path], shape: ModelShape, held: Mapping[str, HeldParameter], tensor_rank: int) -> None:
    published_name = parameter_names(shape).published_name
    with ExitStack() as stack:
        found: dict[str, tuple[Path, Any, str]] = {}
        for file in files:  # of a name that two files have transformers takes the last
            opened = stack.enter_context(safe_open(file, framework="pt"))
            found |= {published_name(name): (file, opened, name) for name in opened.keys()}  # noqa: SIM118
        for part in held.values():
            shard = part.tensor.detach()
            for row in _sample(part.entry, shard.shape, tensor_rank):
                name = part.entry.sources[row.source].name
                file, opened, written = found[name]
                own = shard[row.shard_index].cpu()
                other = opened.get_slice(written)[row.source_index].to(own.dtype).reshape(own.shape)
                if not torch.equal(own, other):
                    raise ValueError(f"{file}: {name}: row {row.source_index[0].start} was not loaded as it is there")


def _sample(entry: ParameterEntry, shard_shape: torch.Size, rank: int) -> Iterator[ShardBlock]:
    """The first, a middle and the last row that the shard has of the parameter."""
    own = list(blocks(entry, shard_shape, rank))
    if not own:
        return
    yield _row(own[0], 0)
    middle = own[len(own) // 2]
    yield _row(middle, _num_rows(middle) // 2)
    yield _row(own[-1], _num_rows(own[-1]) - 1)


def _num_rows(block: ShardBlock) -> int:
    return block.source_index[0].stop - block.source_index[0].start


def _row(block: ShardBlock, number: int) -> ShardBlock:
    """The block of one row within another."""
    source, shard = (
        (slice(index[0].start + number, index[0].start + number + 1), *index[1:])
        for index in (block.source_index, block.shard_index)
    )
    return ShardBlock(block.source, source, shard)
