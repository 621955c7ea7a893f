"""The tensors of a checkpoint: where each box of a parameter lies, read from `.metadata` or planned.

The format is torch.distributed.checkpoint's, as Megatron-Core's `torch_dist` strategy reads it: `.metadata` says which
boxes there are, `*.distcp` hold them one after the other. A checkpoint of a run may have cut a parameter into boxes by
rows or by columns; a planned one (checkpoint_plan.py) by rows alone.
"""

from __future__ import annotations

import io
import math
import os
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from megatron_papo.checkpoint.blobs import values_offset
from megatron_papo.checkpoint.conversion.spans import num_values
from megatron_papo.checkpoint.conversion.stores import Strip
from megatron_papo.checkpoint.folders import raise_faults
from megatron_papo.checkpoint.slices import Entry

METADATA_FILE = ".metadata"
_OTHER_KEYS = ("optimizer.", "rng/", "common_state/")
"""What a checkpoint holds beside parameters."""


@dataclass(frozen=True)
class Box:
    """Rows `row : row + length`, columns `column : column + width`, stored as `size` bytes from `offset` of `file`."""

    file: str
    offset: int
    size: int
    row: int
    length: int
    column: int
    width: int
    values: int | None
    """Where the values begin in the file; None: yet to be looked up."""


class CheckpointFiles:
    """The parameters of a checkpoint by Megatron name."""

    def __init__(self, folder: Path, dtypes: Mapping[str, torch.dtype], boxes: Mapping[str, list[Box]]):
        self.folder, self._dtypes, self.boxes = folder, dtypes, dict(boxes)

    @classmethod
    def read(cls, folder: Path, table: Mapping[str, Entry]) -> CheckpointFiles:
        """From `.metadata`. Raises ValueError, a line a fault, naming file and tensor."""
        file = folder / METADATA_FILE
        try:
            metadata: Metadata = pickle.loads(file.read_bytes())
            stored = {n: m for n, m in metadata.state_dict_metadata.items() if isinstance(m, TensorStorageMetadata)}
        except OSError as error:
            raise ValueError(f"{file}: {error.strerror}") from None
        except (pickle.UnpicklingError, EOFError, AttributeError, ValueError, ImportError, IndexError) as error:
            raise ValueError(f"{file}: not the metadata of a checkpoint: {error}") from None
        _check(file, stored, table)
        boxes = {name: _boxes(file, name, stored[name], metadata.storage_data) for name in table}
        raise_faults(_cut_short(folder, boxes))
        return cls(folder, {name: stored[name].properties.dtype for name in table}, boxes)

    def dtype(self, entry: Entry) -> torch.dtype:
        return self._dtypes[entry.name]

    def strips(self, entry: Entry, start: int, stop: int) -> Iterator[Strip]:
        size = self._dtypes[entry.name].itemsize
        for box in self._located(entry):
            first, last = max(start, box.row), min(stop, box.row + box.length)
            if last > first:
                assert box.values is not None
                offset = box.values + (first - box.row) * box.width * size
                yield Strip(box.file, offset, first, last - first, box.column, box.width)

    def _located(self, entry: Entry) -> list[Box]:
        boxes = self.boxes[entry.name]
        if any(box.values is None for box in boxes):
            boxes = self.boxes[entry.name] = [self._locate(entry, box) for box in boxes]
        return boxes

    def _locate(self, entry: Entry, box: Box) -> Box:
        path = self.folder / box.file
        shape = (box.length,) if len(entry.shape) == 1 else (box.length, box.width)
        try:
            with open(path, "rb") as file, io.BufferedReader(_Part(file.fileno(), box.offset, box.size)) as blob:
                values = box.offset + values_offset(blob, shape, self._dtypes[entry.name])
        except OSError as error:
            raise ValueError(f"{path}: {entry.name}: {error.strerror}") from None
        except ValueError as error:
            raise ValueError(f"{path}: {entry.name}: {error}") from None
        return Box(box.file, box.offset, box.size, box.row, box.length, box.column, box.width, values)


class _Part(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, handle: int, offset: int, size: int):
        self._handle, self._offset, self._size, self._at = handle, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        length = max(0, min(len(buffer), self._size - self._at))
        count = os.preadv(self._handle, [memoryview(buffer)[:length]], self._offset + self._at)
        self._at += count
        return count


def _check(file: Path, stored: Mapping[str, TensorStorageMetadata], table: Mapping[str, Entry]) -> None:
    faults = [f"{file}: {name} {entry.shape}: missing" for name, entry in table.items() if name not in stored]
    for name, found in stored.items():
        shape = tuple(found.size)
        if name in table:
            if shape != table[name].shape:
                faults.append(f"{file}: {name}: expected shape {table[name].shape}, found {shape}")
            elif sum(math.prod(chunk.sizes) for chunk in found.chunks) != num_values(table[name]):
                faults.append(f"{file}: {name}: its boxes do not cover it once")
        elif not name.startswith(_OTHER_KEYS):
            faults.append(f"{file}: {name} {shape}: no such parameter in the model that config.json describes")
    raise_faults(faults)


def _boxes(file: Path, name: str, stored: TensorStorageMetadata, places: Mapping[MetadataIndex, Any]) -> list[Box]:
    found = []
    for chunk in stored.chunks:
        place = places.get(MetadataIndex(name, chunk.offsets))
        if place is None or getattr(place, "transform_descriptors", None):
            raise ValueError(f"{file}: {name}: no plain box at {tuple(chunk.offsets)}")
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
