"""Hugging Face folder <-> checkpoint in one process, and the comparison of two of them. No model is built.

A checkpoint holds each parameter whole and unpadded, so conversion is the name table alone and does not depend on the
layout that will read it. Needs `parallel.initialize` (one rank). From a checkpoint one parameter at a time is in
memory; into one, the whole model is.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from megatron_papo.checkpoint.atomic import publish
from megatron_papo.checkpoint.folders import HuggingFaceReader, copy_side_files, write_folder
from megatron_papo.checkpoint.huggingface import Progress
from megatron_papo.checkpoint.names import parameter_table
from megatron_papo.checkpoint.parameters import Held
from megatron_papo.checkpoint.slices import assemble, fill_shard
from megatron_papo.checkpoint.state import (
    check_stored,
    is_checkpoint,
    load_tensors,
    model_tensors,
    read_state_file,
    stored_shapes,
    write_state_file,
    write_tensors,
)
from megatron_papo.model.shape import ModelShape


def hf_to_checkpoint(source: Path, target: Path, progress: Progress | None = None) -> None:
    """Writes the checkpoint `target` (step 0, no optimizer), in the dtype of the files; it appears whole or not at all.

    Raises ValueError naming tensors of `source` that are missing, extra or misshapen.
    """
    shape = ModelShape.from_folder(source)
    table = parameter_table(shape)
    held = {}
    with HuggingFaceReader(source) as reader:
        reader.check(shape)
        for name, entry in table.items():
            whole = torch.empty(entry.shape, dtype=reader.dtype(entry.sources[0].name))
            fill_shard(entry, whole, 0, reader.read)
            held[name] = Held(entry, whole)
            if progress:
                progress(len(held), len(table))
    partial = target.with_name(f"{target.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_tensors(partial, model_tensors(held))
    write_state_file(
        partial, step=0, optimizer_step=0, schedule_steps=0, random_states=False, cursor={}, config={}, serial=0
    )
    copy_side_files(source, partial)
    publish(partial, target)


def checkpoint_to_hf(source: Path, target: Path, files: Path | None = None, progress: Progress | None = None) -> None:
    """Writes the weights of the checkpoint `source` as the Hugging Face folder `target`.

    Config, tokenizer and processor come from the checkpoint itself, or from the folder `files`.
    """
    read_state_file(source)  # names a folder that is no checkpoint
    files = files or source
    shape = ModelShape.from_folder(files)
    write_folder(_counted(checkpoint_tensors(source, shape), shape, progress), target, files)


def differences(first: Path, second: Path, limit: int = 10, progress: Progress | None = None) -> list[str]:
    """The first `limit` differences between the weights in two folders, each Hugging Face's or a checkpoint.

    Tensors are compared bit for bit, dtype and shape too; a line names the tensor. Empty: they are the same.
    """
    found: list[str] = []
    with ExitStack() as stack:
        shape = ModelShape.from_folder(first)
        others = _tensors(second, _shape_of(second, shape), stack)
        for (name, left), (other, right) in zip(_counted(_tensors(first, shape, stack), shape, progress), others):
            assert name == other, (name, other)
            found += _difference(name, left, right)
            if len(found) >= limit:
                break
    return found


def checkpoint_tensors(folder: Path, shape: ModelShape) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, full tensor) of a checkpoint, in the table's order, one parameter in memory at a time."""
    stored = stored_shapes(folder)
    table = parameter_table(shape)
    blank = {name: Held(entry, torch.empty(entry.shape, device="meta")) for name, entry in table.items()}
    check_stored(folder, model_tensors(blank), stored)
    for name, entry in table.items():
        whole = torch.empty(entry.shape, dtype=stored[name].dtype)
        load_tensors(folder, dict(model_tensors({name: Held(entry, whole)})))
        for source, tensor in zip(entry.sources, assemble(entry, [whole]), strict=True):
            yield source.name, tensor


def _tensors(folder: Path, shape: ModelShape, stack: ExitStack) -> Iterator[tuple[str, Tensor]]:
    """The same from either kind of folder."""
    if is_checkpoint(folder):
        return checkpoint_tensors(folder, shape)
    reader = stack.enter_context(HuggingFaceReader(folder))
    reader.check(shape)
    names = [source.name for entry in parameter_table(shape).values() for source in entry.sources]
    return ((name, reader.read(name, (slice(None),))) for name in names)


def _shape_of(folder: Path, other: ModelShape) -> ModelShape:
    """Raises ValueError when `folder` names another model; a checkpoint without config.json is taken for the same."""
    if not (folder / "config.json").exists():
        return other
    shape = ModelShape.from_folder(folder)
    if shape.language != other.language or shape.vision != other.vision:
        raise ValueError(f"{folder / 'config.json'}: another model: {shape} is not {other}")
    return shape


def _difference(name: str, left: Tensor, right: Tensor) -> list[str]:
    for what, a, b in (("dtype", left.dtype, right.dtype), ("shape", tuple(left.shape), tuple(right.shape))):
        if a != b:
            return [f"{name}: {what} {a} and {b}"]
    width = left.element_size()
    bits = left.contiguous().view(-1).view(torch.uint8) != right.contiguous().view(-1).view(torch.uint8)
    count = int(bits.view(-1, width).any(1).sum())  # bit patterns: NaNs that are the same count as equal
    if not count:
        return []
    gap = (left.double() - right.double()).abs().max().item()
    return [f"{name}: {count} of {left.numel()} values differ, by at most {gap:.3g}"]


def _counted(
    tensors: Iterator[tuple[str, Tensor]], shape: ModelShape, progress: Progress | None
) -> Iterator[tuple[str, Tensor]]:
    total = sum(len(entry.sources) for entry in parameter_table(shape).values())
    for done, item in enumerate(tensors):
        yield item
        if progress:
            progress(done + 1, total)
