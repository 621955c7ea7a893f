"""The tensors of a checkpoint: where each box of a parameter lies, read from `.metadata` or planned.

The format is torch.distributed.checkpoint's, as Megatron-Core's `torch_dist` strategy reads it: `.metadata` says which
boxes there are, and `*.distcp` files hold them one after the other. A checkpoint that a run wrote may have cut a
parameter into boxes by rows or by columns. A planned one is cut by rows alone, so that whoever loads the checkpoint
never holds more than one box beside its own weights.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from megatron_papo.checkpoint.archive import (
    METADATA_FILE,
    BytesFile,
    StoredBox,
    StoredTensor,
    frame,
    values_offset,
    write_metadata,
)
from megatron_papo.checkpoint.checksums import SumsByFile, new_sum, sum_of, write_box_sums
from megatron_papo.checkpoint.opening import FORMAT_FILE, Opened, open_checkpoint
from megatron_papo.checkpoint.state_file import FORMAT
from megatron_papo.conversion.stores import Box, Files, Strip, width
from megatron_papo.model.parameter_map import ParameterEntry
from megatron_papo.weights.huggingface_folder import raise_faults

_OTHER_KEYS = ("optimizer.", "rng/", "common_state/")
"""How the names begin of what a checkpoint holds beside parameters."""


class CheckpointFiles:
    """A store of the parameters of a checkpoint, by Megatron name."""

    def __init__(
        self, folder: Path, dtypes: Mapping[str, torch.dtype], boxes: Mapping[str, list[Box]],
        opened: Opened | None = None,
    ):  # fmt: skip
        """`opened` has the checksums that boxes are compared with; with None they are not checked."""
        self.folder, self._dtypes, self.boxes, self._opened = folder, dtypes, dict(boxes), opened
        self._sums: dict[Files, BoxSums] = {}

    @classmethod
    def read(cls, folder: Path, table: Mapping[str, ParameterEntry], checked: bool = True) -> CheckpointFiles:
        """The store that `.metadata` describes.

        Raises ValueError, a line a fault, naming file and tensor, and DamagedCheckpoint for what is not as it was
        written; with `checked`, also while boxes are read.
        """
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
        digest = self._sums[files].add(box, strip.offset, data, num_bytes)
        if digest is not None:
            self._opened.check_box(entry.name, box.file, box.offset, box.size, digest)

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
                part = BytesFile(box.size, lambda at, size: os.pread(file.fileno(), size, box.offset + at))
                values = box.offset + values_offset(part, shape, self._dtypes[entry.name])
        except OSError as error:
            raise ValueError(f"{path}: {entry.name}: {error.strerror}") from None
        except ValueError as error:
            raise ValueError(f"{path}: {entry.name}: {error}") from None
        return replace(box, values=values)


class BoxSums:
    """Checksums of boxes whose values stream by, a part at a time and in order: of those read and those written.

    `around(box, offset, size)` gives bytes of the file that are not values, before or behind them.
    """

    def __init__(self, around: Callable[[Box, int, int], bytes]):
        self._around = around
        self._started: dict[tuple[str, int], tuple[int, Any]] = {}

    def add(self, box: Box, offset: int, data: memoryview, num_bytes: int) -> str | None:
        """Adds `data`, which lies at `offset` of the file. Returns the checksum of the box when these were the last of
        its `num_bytes` of values, else None.

        Values that do not follow the ones before, because they are read once more for another purpose, do not count.
        """
        assert box.values is not None
        key, end = (box.file, box.offset), box.values + num_bytes
        if offset == box.values:
            total = new_sum()
            total.update(self._around(box, box.offset, box.values - box.offset))
            self._started[key] = offset, total
        due, total = self._started.get(key, (None, None))
        if total is None or due != offset:
            return None
        total.update(data)
        self._started[key] = offset + len(data), total
        if offset + len(data) < end:
            return None
        total.update(self._around(box, end, box.offset + box.size - end))
        del self._started[key]
        return total.hexdigest()


def _check(file: Path, stored: Mapping[str, TensorStorageMetadata], table: Mapping[str, ParameterEntry]) -> None:
    faults = [f"{file}: {name} {entry.shape}: missing" for name, entry in table.items() if name not in stored]
    for name, tensor in stored.items():
        shape = tuple(tensor.size)
        if name in table:
            if shape != table[name].shape:
                faults.append(f"{file}: {name}: expected shape {table[name].shape}, found {shape}")
        elif not name.startswith(_OTHER_KEYS):
            faults.append(f"{file}: {name} {shape}: no such parameter in the model that config.json describes")
    raise_faults(faults)


def _boxes(file: Path, name: str, stored: TensorStorageMetadata, places: Mapping[MetadataIndex, Any]) -> list[Box]:
    boxes = []
    for chunk in stored.chunks:
        place = places.get(MetadataIndex(name, chunk.offsets))
        if place is None:
            raise ValueError(f"{file}: {name}: no box at {tuple(chunk.offsets)}")
        (row, *column), (length, *columns) = chunk.offsets, chunk.sizes
        boxes.append(
            Box(place.relative_path, place.offset, place.length, row, length, sum(column), math.prod(columns), None)
        )
    return sorted(boxes, key=lambda box: (box.row, box.column))


def _cut_short(folder: Path, boxes: Mapping[str, list[Box]]) -> list[str]:
    """A line for each file that is missing or ends within a box, naming the first box that it lacks."""
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


def plan_boxes(
    name: str, entries: list[ParameterEntry], dtypes: Mapping[str, torch.dtype], box_bytes: int
) -> tuple[dict[str, list[Box]], list[tuple[int, bytes]], int]:
    """Plans the boxes of `entries` in one file, one after the other. A box is whole rows, of at most `box_bytes` but at
    least one row.

    Returns the boxes by parameter, the bytes around their values as (offset, bytes), and the size of the file.
    """
    boxes: dict[str, list[Box]] = {}
    around, at = [], 0
    for entry in entries:
        dtype, columns = dtypes[entry.name], width(entry)
        rows = max(1, box_bytes // (columns * dtype.itemsize))
        for row in range(0, entry.shape[0], rows):
            length = min(rows, entry.shape[0] - row)
            parts = frame((length, *entry.shape[1:]), dtype)
            values, num_bytes = at + len(parts.before), length * columns * dtype.itemsize
            size = len(parts.before) + num_bytes + len(parts.behind)
            around += [(at, parts.before), (values + num_bytes, parts.behind)]
            boxes.setdefault(entry.name, []).append(Box(name, at, size, row, length, 0, columns, values))
            at += size
    return boxes, around, at


def write_small_files(
    folder: Path, store: CheckpointFiles, table: Mapping[str, ParameterEntry], common_file: str,
    sums: Mapping[str, Sequence[str]],
) -> None:  # fmt: skip
    """Writes what makes boxes a checkpoint, except state.json: `.metadata`, the empty common state, metadata.json, and
    the checksums of the boxes if `sums`, by parameter, has all of them."""
    tensors = {
        name: StoredTensor(
            store.dtype(entry), torch.Size(entry.shape), [_stored_box(entry, box) for box in store.boxes[name]]
        )
        for name, entry in table.items()
    }
    common = write_metadata(folder, tensors, common_file)
    (folder / FORMAT_FILE).write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    if all(len(sums[name]) == len(store.boxes[name]) for name in table):  # the journal of an older version has none
        boxes: SumsByFile = {common_file: [(0, len(common), sum_of(common))]}
        for name in table:
            for box, digest in zip(store.boxes[name], sums[name]):
                boxes.setdefault(box.file, []).append((box.offset, box.size, digest))
        write_box_sums(folder, boxes)


def _stored_box(entry: ParameterEntry, box: Box) -> StoredBox:
    rank = len(entry.shape)
    offsets, sizes = torch.Size((box.row, box.column)[:rank]), torch.Size((box.length, box.width)[:rank])
    return StoredBox(offsets, sizes, box.file, box.offset, box.size)


def state_tree() -> dict[str, Any]:
    """The state.json of weights alone, as a run of one rank would save them before its first step."""
    return {
        "format": FORMAT, "step": 0, "layout": {"tensor": 1, "pipeline": 1, "data": 1}, "optimizer_step": 0,
        "schedule_steps": 0, "random_states": False, "cursor": {}, "config": {}, "serial": 0,
    }  # fmt: skip
