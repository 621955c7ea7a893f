"""A cheap check of the loaded weights, in every command that loads a Hugging Face folder, before they are used.

The certificate compares forward passes and belongs to training. This check compares the weights themselves with
transformers' own reading of the folder: which files it takes, which parameters of which shapes its model has by its
own reading of config.json, and three rows of every parameter of this rank, read again from the files that transformers
takes. It compares rows and not whole tensors, so as not to read everything twice (docs/models.md has what the check
costs). Leaves out what only a forward pass shows.
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


def look(folder: Path, shape: ModelShape, loaded: Mapping[str, HeldParameter], tensor_rank: int) -> None:
    """Raises ValueError naming what transformers reads differently. `loaded`: this rank's parameters, as they were
    loaded from `folder`."""
    files = files_of_transformers(folder)
    _compare_files(folder, files)
    _compare_names(folder, shape)
    _compare_rows(files, shape, loaded, tensor_rank)


def files_of_transformers(folder: Path) -> list[Path]:
    """The files that transformers' `from_pretrained` would read. This calls a private function of transformers, so it
    passes only the arguments that this version's function has; tests cover both versions that are supported."""
    from transformers.modeling_utils import _get_resolved_checkpoint_files as resolve

    known: dict[str, Any] = {
        "pretrained_model_name_or_path": str(folder), "variant": None, "gguf_file": None, "use_safetensors": True,
        "user_agent": None, "is_remote_code": False, "transformers_explicit_filename": None,
        "download_kwargs": {"local_files_only": True},
    }  # fmt: skip
    wanted = inspect.signature(resolve).parameters
    try:
        files, _ = resolve(**{name: value for name, value in known.items() if name in wanted})
    except Exception as error:  # transformers raises errors of many types
        raise ValueError(f"{folder}: transformers finds no weights: {type(error).__name__}: {error}") from error
    return [Path(file) for file in files or []]


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


def _compare_rows(files: list[Path], shape: ModelShape, loaded: Mapping[str, HeldParameter], tensor_rank: int) -> None:
    """Raises ValueError naming a row that was loaded with other values than the file has."""
    published_name = parameter_names(shape).published_name
    with ExitStack() as stack:
        sources: dict[str, tuple[Path, Any, str]] = {}
        for file in files:  # where two files have a name, transformers takes it from the last
            opened = stack.enter_context(safe_open(file, framework="pt"))
            sources |= {published_name(name): (file, opened, name) for name in opened.keys()}  # noqa: SIM118
        for part in loaded.values():
            shard = part.tensor.detach()
            for row in _sample(part.entry, shard.shape, tensor_rank):
                name = part.entry.sources[row.source].name
                file, opened, written = sources[name]
                own = shard[row.shard_index].cpu()
                other = opened.get_slice(written)[row.source_index].to(own.dtype).reshape(own.shape)
                if not torch.equal(own, other):
                    raise ValueError(f"{file}: {name}: row {row.source_index[0].start} was not loaded as it is there")


def _sample(entry: ParameterEntry, shard_shape: torch.Size, rank: int) -> Iterator[ShardBlock]:
    """The first, a middle and the last row of the parameter that are in this rank's shard."""
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
    """The part of `block` that has only its row `number`."""
    source, shard = (
        (slice(index[0].start + number, index[0].start + number + 1), *index[1:])
        for index in (block.source_index, block.shard_index)
    )
    return ShardBlock(block.source, source, shard)
