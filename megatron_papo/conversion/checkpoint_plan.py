"""A checkpoint that is to be written: where every box will lie, and the small files that make boxes a checkpoint.

Parameters are cut into boxes by rows, so that whoever loads the checkpoint never holds more than a box beside its own.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_papo.checkpoint.blobs import frame
from megatron_papo.checkpoint.checksums import Boxes, sum_of, write_box_sums
from megatron_papo.checkpoint.metadata_file import METADATA_FILE
from megatron_papo.checkpoint.opening import FORMAT_FILE
from megatron_papo.checkpoint.state_file import FORMAT
from megatron_papo.conversion.box_sums import Box
from megatron_papo.conversion.checkpoint_files import CheckpointFiles
from megatron_papo.conversion.spans import width
from megatron_papo.model.parameter_map import ParameterEntry

_COMMON = "common_state/shard_0_1"
"""Where Megatron-Core looks for what is no tensor; here there is nothing."""


def plan_boxes(
    name: str, entries: list[ParameterEntry], dtypes: Mapping[str, torch.dtype], box_bytes: int
) -> tuple[dict[str, list[Box]], list[tuple[int, bytes]], int]:
    """The boxes of `entries` in one file, one after the other, the bytes (offset, bytes) around their values, and the
    file's size. A box is of rows, and of at most `box_bytes` but one row at least."""
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


def write_metadata(
    folder: Path, store: CheckpointFiles, table: Mapping[str, ParameterEntry], common_file: str,
    sums: Mapping[str, Sequence[str]],
) -> None:  # fmt: skip
    """Writes what makes the boxes a checkpoint: `.metadata`, the empty common state, metadata.json, and the boxes'
    checksums where `sums`, by parameter, has them."""
    described: dict[str, Any] = {_COMMON: BytesStorageMetadata()}
    common = io.BytesIO()
    torch.save([{}], common)
    (folder / common_file).write_bytes(common.getvalue())
    places = {MetadataIndex(_COMMON): _StorageInfo(common_file, 0, len(common.getvalue()))}
    for name, entry in table.items():
        chunks = []
        for index, box in enumerate(store.boxes[name]):
            offsets, sizes = (box.row, box.column), (box.length, box.width)
            rank = len(entry.shape)
            chunks.append(ChunkStorageMetadata(torch.Size(offsets[:rank]), torch.Size(sizes[:rank])))
            places[MetadataIndex(name, chunks[-1].offsets, index)] = _StorageInfo(box.file, box.offset, box.size)
        properties = TensorProperties(dtype=store.dtype(entry))
        described[name] = TensorStorageMetadata(properties, torch.Size(entry.shape), chunks)
    metadata = Metadata(described, storage_data=places, version=CURRENT_DCP_VERSION)
    (folder / METADATA_FILE).write_bytes(pickle.dumps(metadata))
    (folder / FORMAT_FILE).write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    if all(len(sums[name]) == len(store.boxes[name]) for name in table):  # not of an older version's journal
        boxes: Boxes = {common_file: [(0, len(common.getvalue()), sum_of(common.getvalue()))]}
        for name in table:
            for box, digest in zip(store.boxes[name], sums[name]):
                boxes.setdefault(box.file, []).append((box.offset, box.size, digest))
        write_box_sums(folder, boxes)


def state_tree() -> dict[str, Any]:
    """The state.json of weights alone, as a run of one rank would save them before its first step."""
    return {
        "format": FORMAT, "step": 0, "layout": {"tensor": 1, "pipeline": 1, "data": 1}, "optimizer_step": 0,
        "schedule_steps": 0, "random_states": False, "cursor": {}, "config": {}, "serial": 0,
    }  # fmt: skip
