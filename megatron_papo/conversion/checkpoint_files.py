"""The tensors of a checkpoint: where each box of a parameter lies, read from `.metadata` or planned.

The format is torch.distributed.checkpoint's, as Megatron-Core's `torch_dist` strategy reads it: `.metadata` says which
boxes there are, `*.distcp` hold them one after the other. A checkpoint of a run may have cut a parameter into boxes by
rows or by columns; a planned one (checkpoint_plan.py) by rows alone.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from megatron_papo.checkpoint.blobs import Part, values_offset
from megatron_papo.checkpoint.metadata_file import METADATA_FILE
from megatron_papo.checkpoint.opening import Opened, open_checkpoint
from megatron_papo.conversion.box_sums import Box, BoxSums
from megatron_papo.conversion.stores import Files, Strip
from megatron_papo.model.parameter_map import ParameterEntry
from megatron_papo.weights.huggingface_folder import raise_faults

_OTHER_KEYS = ("optimizer.", "rng/", "common_state/")
"""What a checkpoint holds beside parameters."""


class CheckpointFiles:
    """The parameters of a checkpoint by Megatron name."""

    def __init__(
        self, folder: Path, dtypes: Mapping[str, torch.dtype], boxes: Mapping[str, list[Box]],
        opened: Opened | None = None,
    ):  # fmt: skip
        """`opened`: has the checksums that boxes are to have; None: they are not checked."""
        self.folder, self._dtypes, self.boxes, self._opened = folder, dtypes, dict(boxes), opened
        self._sums: dict[Files, BoxSums] = {}

    @classmethod
    def read(cls, folder: Path, table: Mapping[str, ParameterEntry], checked: bool = True) -> CheckpointFiles:
        """From `.metadata`. Raises ValueError, a line a fault, naming file and tensor; DamagedCheckpoint for what is
        not as it was written, with `checked` also while boxes are read."""
        opened = open_checkpoint(folder)
        file, metadata = folder / METADATA_FILE, opened.metadata
        stored = {n: m for n, m in metadata.state_dict_metadata.items() if isinstance(m, TensorStorageMetadata)}
        _check(file, stored, table)
        boxes = {name: _boxes(file, name, stored[name], metadata.storage_data) for name in table}
        raise_faults(_cut_short(folder, boxes))
        dtypes = {name: stored[name].properties.dtype for name in table}
        return cls(folder, dtypes, boxes, opened if checked and opened.box_sums is not None else None)

    def dtype(self, entry: ParameterEntry) -> torch.dtype:
        return self._dtypes[entry.name]

    def strips(self, entry: ParameterEntry, start: int, stop: int) -> Iterator[Strip]:
        size = self._dtypes[entry.name].itemsize
        for box in self._located(entry):
            first, last = max(start, box.row), min(stop, box.row + box.length)
            if last > first:
                assert box.values is not None
                offset = box.values + (first - box.row) * box.width * size
                yield Strip(box.file, offset, first, last - first, box.column, box.width, box)

    def check(self, files: Files, entry: ParameterEntry, strip: Strip, data: memoryview) -> None:
        """Raises DamagedCheckpoint when these are the last values of a box that is not as it was written."""
        box = strip.box
        if self._opened is None or box is None:
            return
        if files not in self._sums:
            self._sums[files] = BoxSums(lambda box, offset, size: files.some(box.file, offset, size))
        num_bytes = box.length * box.width * self._dtypes[entry.name].itemsize
        found = self._sums[files].add(box, strip.offset, data, num_bytes)
        if found is not None:
            self._opened.check_box(entry.name, box.file, box.offset, box.size, found)

    def _located(self, entry: ParameterEntry) -> list[Box]:
        boxes = self.boxes[entry.name]
        if any(box.values is None for box in boxes):
            boxes = self.boxes[entry.name] = [self._locate(entry, box) for box in boxes]
        return boxes

    def _locate(self, entry: ParameterEntry, box: Box) -> Box:
        path = self.folder / box.file
        shape = (box.length,) if len(entry.shape) == 1 else (box.length, box.width)
        try:
            with open(path, "rb") as file:
                part = Part(box.size, lambda at, size: os.pread(file.fileno(), size, box.offset + at))
                values = box.offset + values_offset(part, shape, self._dtypes[entry.name])
        except OSError as error:
            raise ValueError(f"{path}: {entry.name}: {error.strerror}") from None
        except ValueError as error:
            raise ValueError(f"{path}: {entry.name}: {error}") from None
        return replace(box, values=values)


def _check(file: Path, stored: Mapping[str, TensorStorageMetadata], table: Mapping[str, ParameterEntry]) -> None:
    faults = [f"{file}: {name} {entry.shape}: missing" for name, entry in table.items() if name not in stored]
    for name, found in stored.items():
        shape = tuple(found.size)
        if name in table:
            if shape != table[name].shape:
                faults.append(f"{file}: {name}: expected shape {table[name].shape}, found {shape}")
        elif not name.startswith(_OTHER_KEYS):
            faults.append(f"{file}: {name} {shape}: no such parameter in the model that config.json describes")
    raise_faults(faults)


def _boxes(file: Path, name: str, stored: TensorStorageMetadata, places: Mapping[MetadataIndex, Any]) -> list[Box]:
    found = []
    for chunk in stored.chunks:
        place = places.get(MetadataIndex(name, chunk.offsets))
        if place is None:
            raise ValueError(f"{file}: {name}: no box at {tuple(chunk.offsets)}")
        (row, *column), (length, *columns) = chunk.offsets, chunk.sizes
        found.append(
            Box(place.relative_path, place.offset, place.length, row, length, sum(column), math.prod(columns), None)
        )
    return sorted(found, key=lambda box: (box.row, box.column))


def _cut_short(folder: Path, boxes: Mapping[str, list[Box]]) -> list[str]:
    """A line for each file that is not there or ends within a box, naming the first one that it lacks."""
    sizes: dict[str, int] = {}
    faults: dict[str, str] = {}
    for name, several in boxes.items():
        for box in several:
            file = folder / box.file
            if box.file not in sizes:
                sizes[box.file] = file.stat().st_size if file.is_file() else -1
            if sizes[box.file] < 0:
                faults.setdefault(box.file, f"{file}: {name}: no such file")
            elif sizes[box.file] < box.offset + box.size:
                end = f"its box ends at byte {box.offset + box.size}, the file at {sizes[box.file]}"
                faults.setdefault(box.file, f"{file}: {name}: truncated: {end}")
    return list(faults.values())
