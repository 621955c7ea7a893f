"""What a conversion will do, planned before the first byte is written: from headers alone, the same on every worker.

The target is cut into files, each of which one worker writes. How it is cut does not depend on the number of workers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_papo.checkpoint.state_file import names_checkpoint, read_state_file
from megatron_papo.conversion.checkpoint_files import CheckpointFiles, plan_boxes
from megatron_papo.conversion.huggingface_files import HuggingFaceFiles, Stored, plan_file
from megatron_papo.conversion.stores import Box, Store, num_values, parameter_bytes
from megatron_papo.model.parameter_map import ParameterEntry, parameter_table
from megatron_papo.model.shape import ModelShape

Direction = Literal["hf-to-megatron", "megatron-to-hf"]
VERSION = 1
"""The version of the planned layout; another version does not continue a conversion that this one began."""


@dataclass(frozen=True)
class Settings:
    """What the user chooses about the target."""

    dtype: torch.dtype | None = None
    """The dtype of the target; None takes that of the source, parameter by parameter."""
    file_bytes: int = 2 * 10**9
    """The most bytes of values in one file, which holds at least one parameter."""
    box_bytes: int = 128 * 2**20
    """The most bytes of values in one box of a checkpoint, which holds at least one row."""


@dataclass(frozen=True)
class FileUnit:
    """A unit of work: one file of the target, which one worker writes."""

    file: str
    entries: tuple[ParameterEntry, ...]
    num_bytes: int
    around: tuple[tuple[int, bytes], ...]
    """The bytes of the file that are not values of a tensor, as (offset, bytes)."""


@dataclass(frozen=True)
class ConversionPlan:
    """A whole conversion, planned."""

    direction: Direction
    files: Path
    """The folder that config, tokenizer and processor are copied from."""
    table: dict[str, ParameterEntry]
    source: Store
    target: Store
    """The store in the folder that is being written; its tensors are there when that is done."""
    units: tuple[FileUnit, ...]
    fingerprint: str
    """A hash of all that the target depends on, including the times at which the files of the source were written."""

    @property
    def num_bytes(self) -> int:
        """The size of the tensors of the target."""
        return sum(parameter_bytes(self.target, entry) for entry in self.table.values())

    @property
    def file_bytes(self) -> int:
        """The size of the files of the target that hold tensors."""
        return sum(unit.num_bytes for unit in self.units)


def open_store(folder: Path, shape: ModelShape, checked: bool = True) -> Store:
    """The weights in a folder of either kind. Raises ValueError, a line a fault, for what does not fit `shape`.

    With `checked`, boxes of a checkpoint are compared with their checksums as they are read.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if names_checkpoint(folder):
        return CheckpointFiles.read(folder, parameter_table(shape), checked)
    return HuggingFaceFiles.read(folder, shape)


def make_plan(
    direction: Direction, source: Path, partial: Path, settings: Settings, files: Path | None
) -> ConversionPlan:
    """Plans the conversion of `source` into the folder `partial`; `files` is the folder of config and tokenizer, by
    default the source. Raises ValueError naming file and tensor for a source that cannot be converted."""
    if direction == "megatron-to-hf":
        read_state_file(source)  # refuses a folder that is no checkpoint, by name
    files = files or source
    shape = ModelShape.from_folder(files)
    table = parameter_table(shape)
    opened: Store
    if direction == "megatron-to-hf":
        opened = CheckpointFiles.read(source, table)
    else:
        opened = HuggingFaceFiles.read(source, shape)
    dtypes = {name: settings.dtype or opened.dtype(entry) for name, entry in table.items()}
    target, units = plan_target(direction, partial, table, dtypes, settings)
    return ConversionPlan(direction, files, table, opened, target, units, _fingerprint(direction, opened, files, units))


def plan_target(
    direction: Direction, folder: Path, table: Mapping[str, ParameterEntry], dtypes: Mapping[str, torch.dtype],
    settings: Settings,
) -> tuple[Store, tuple[FileUnit, ...]]:  # fmt: skip
    """The files of the target, and the store that says where everything lies in them. Needs no weights."""
    groups = _groups(table, dtypes, settings.file_bytes)
    units: list[FileUnit] = []
    if direction == "hf-to-megatron":
        boxes: dict[str, list[Box]] = {}
        for number, entries in enumerate(groups):
            file = f"__{number}_0.distcp"
            planned, around, size = plan_boxes(file, entries, dtypes, settings.box_bytes)
            boxes |= planned
            units.append(FileUnit(file, tuple(entries), size, tuple(around)))
        return CheckpointFiles(folder, dtypes, boxes), tuple(units)
    tensors: dict[str, Stored] = {}
    for number, entries in enumerate(groups):
        file = f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors" if len(groups) > 1 else "model.safetensors"
        places, header = plan_file(file, entries, dtypes)
        tensors |= places
        size = len(header) + sum(part.num_bytes for part in places.values())
        units.append(FileUnit(file, tuple(entries), size, ((0, header),)))
    return HuggingFaceFiles(folder, tensors), tuple(units)


def _groups(
    table: Mapping[str, ParameterEntry], dtypes: Mapping[str, torch.dtype], most: int
) -> list[list[ParameterEntry]]:
    """Parameters in the order of the table, grouped so that each file takes as many as fit."""
    groups: list[list[ParameterEntry]] = [[]]
    group_bytes = 0
    for name, entry in table.items():
        size = num_values(entry) * dtypes[name].itemsize
        if groups[-1] and group_bytes + size > most:
            groups.append([])
            group_bytes = 0
        groups[-1].append(entry)
        group_bytes += size
    return groups


def _fingerprint(direction: Direction, source: Store, files: Path, units: tuple[FileUnit, ...]) -> str:
    if isinstance(source, HuggingFaceFiles):
        places: Any = {name: asdict(stored) for name, stored in source.tensors.items()}
        names = {stored.file for stored in source.tensors.values()}
    else:
        assert isinstance(source, CheckpointFiles)
        places = {name: [asdict(box) for box in boxes] for name, boxes in source.boxes.items()}
        names = {box.file for boxes in source.boxes.values() for box in boxes}
    states = {}
    for name in sorted(names):
        try:
            state = (source.folder / name).stat()
        except OSError as error:
            raise ValueError(f"{source.folder / name}: {error.strerror}") from None
        states[name] = [state.st_size, state.st_mtime_ns]
    target = [(unit.file, unit.num_bytes, [(at, data.hex()) for at, data in unit.around]) for unit in units]
    tree = [VERSION, direction, places, states, (files / "config.json").read_text(), target]
    return hashlib.sha256(json.dumps(tree, default=str, sort_keys=True).encode()).hexdigest()
