"""What a conversion will do, known before the first byte: from headers alone, the same on every worker.

The target is cut into files that one worker writes each; how it is cut does not depend on the number of workers.
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
from megatron_papo.conversion.box_sums import Box
from megatron_papo.conversion.checkpoint_files import CheckpointFiles
from megatron_papo.conversion.checkpoint_plan import plan_boxes
from megatron_papo.conversion.huggingface_files import HuggingFaceFiles, Stored, plan_file
from megatron_papo.conversion.spans import num_values
from megatron_papo.conversion.stores import Store
from megatron_papo.model.parameter_map import ParameterEntry, parameter_table
from megatron_papo.model.shape import ModelShape

Direction = Literal["hf-to-megatron", "megatron-to-hf"]
VERSION = 1
"""Of the planned layout; another one does not go on with a conversion that this one began."""


@dataclass(frozen=True)
class Settings:
    dtype: torch.dtype | None = None
    """Of the target; None: that of the source, parameter by parameter."""
    file_bytes: int = 2 * 10**9
    """A file holds at most this much, but one parameter at least."""
    box_bytes: int = 128 * 2**20
    """The same of a box of a checkpoint, but one row at least."""


@dataclass(frozen=True)
class Unit:
    """One file of the target."""

    file: str
    entries: tuple[ParameterEntry, ...]
    num_bytes: int
    around: tuple[tuple[int, bytes], ...]
    """(offset, bytes) of what is not a tensor's values."""


@dataclass(frozen=True)
class ConversionPlan:
    direction: Direction
    files: Path
    """Where config, tokenizer and processor come from."""
    table: dict[str, ParameterEntry]
    source: Store
    target: Store
    """In the folder that is written; it lies there once that is done."""
    units: tuple[Unit, ...]
    fingerprint: str
    """Changes with whatever would change the target, the time at which a source file was written included."""

    @property
    def num_bytes(self) -> int:
        """Of the target's tensors."""
        return sum(parameter_bytes(self.target, entry) for entry in self.table.values())

    @property
    def file_bytes(self) -> int:
        return sum(unit.num_bytes for unit in self.units)


def parameter_bytes(store: Store, entry: ParameterEntry) -> int:
    return num_values(entry) * store.dtype(entry).itemsize


def open_store(folder: Path, shape: ModelShape, checked: bool = True) -> Store:
    """The weights in a folder of either kind. Raises ValueError, a line a fault, for what does not fit `shape`.

    `checked`: boxes of a checkpoint have to be as their checksums say.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if names_checkpoint(folder):
        return CheckpointFiles.read(folder, parameter_table(shape), checked)
    return HuggingFaceFiles.read(folder, shape)


def make_plan(
    direction: Direction, source: Path, partial: Path, settings: Settings, files: Path | None
) -> ConversionPlan:
    """Raises ValueError naming file and tensor for a source that cannot be converted."""
    if direction == "megatron-to-hf":
        read_state_file(source)  # names a folder that is no checkpoint
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
) -> tuple[Store, tuple[Unit, ...]]:  # fmt: skip
    """The files of the target and where everything lies in them; needs no weights."""
    groups = _groups(table, dtypes, settings.file_bytes)
    units: list[Unit] = []
    if direction == "hf-to-megatron":
        boxes: dict[str, list[Box]] = {}
        for number, entries in enumerate(groups):
            file = f"__{number}_0.distcp"
            found, around, size = plan_boxes(file, entries, dtypes, settings.box_bytes)
            boxes |= found
            units.append(Unit(file, tuple(entries), size, tuple(around)))
        return CheckpointFiles(folder, dtypes, boxes), tuple(units)
    tensors: dict[str, Stored] = {}
    for number, entries in enumerate(groups):
        file = f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors" if len(groups) > 1 else "model.safetensors"
        places, header = plan_file(file, entries, dtypes)
        tensors |= places
        size = len(header) + sum(part.num_bytes for part in places.values())
        units.append(Unit(file, tuple(entries), size, ((0, header),)))
    return HuggingFaceFiles(folder, tensors), tuple(units)


def _groups(
    table: Mapping[str, ParameterEntry], dtypes: Mapping[str, torch.dtype], most: int
) -> list[list[ParameterEntry]]:
    """Parameters in the table's order, as many to a file as fit."""
    groups: list[list[ParameterEntry]] = [[]]
    held = 0
    for name, entry in table.items():
        size = num_values(entry) * dtypes[name].itemsize
        if groups[-1] and held + size > most:
            groups.append([])
            held = 0
        groups[-1].append(entry)
        held += size
    return groups


def _fingerprint(direction: Direction, source: Store, files: Path, units: tuple[Unit, ...]) -> str:
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
