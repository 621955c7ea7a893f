"""Reads boxes of a checkpoint into tensors; Megatron's load planner says which part of which box goes where.

Each box is read once, as a whole. Its checksum is computed of the bytes that were read, and its values are copied from
where they lie among these bytes. Nothing is unpickled except the random number states, and these as tensors alone,
whereas Megatron's own reader unpickles whatever a file holds. This is the opposite of box_writing.py. What the names of
tensors mean is left to state.py.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import torch
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.strategies.torch import MCoreLoadPlanner, mcore_to_pyt_state_dict
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from megatron_papo.checkpoint.archive import BytesFile, line_of, values_offset
from megatron_papo.checkpoint.checksums import new_sum
from megatron_papo.checkpoint.opening import Opened
from megatron_papo.distributed.agreement import DamagedCheckpoint

_AT_ONCE_BYTES = 2**18
"""Bytes that are read and then added to the checksum, while they are in the caches."""
_MOST_OBJECT_BYTES = 2**20
"""The largest object that is read; random number states take some kilobytes."""


@torch.no_grad()
def read_boxes(opened: Opened, tree: Mapping[str, ShardedTensor]) -> None:
    """Fills the tensors of `tree` in place; every one of them has to be stored.

    Raises DamagedCheckpoint, after which some of the tensors may have been filled.
    """
    by_key: dict[str, list[ShardedBase]] = {}
    for part in tree.values():
        by_key.setdefault(part.key, []).append(part)
    planner = MCoreLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(mcore_to_pyt_state_dict(by_key, True), opened.metadata, True)
    items: dict[MetadataIndex, list[ReadItem]] = {}
    for item in planner.finish_plan(planner.create_local_plan()).items:
        items.setdefault(item.storage_index, []).append(item)
    for index, box in _boxes(opened, items):
        for item in items[index]:
            target = planner.resolve_tensor(item).detach()
            target.copy_(narrow_tensor_by_index(box, item.storage_offsets, item.lengths))
            planner.commit_tensor(item, target)


def read_object(opened: Opened, name: ShardedObject) -> Any:
    """The stored object `name`: tensors in plain containers. Raises DamagedCheckpoint for anything else."""
    index = MetadataIndex(name.unique_key)
    place = opened.metadata.storage_data.get(index)
    if place is None or not isinstance(opened.metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
        raise DamagedCheckpoint(f"{opened.folder}: {index.fqn}: missing")
    path = opened.folder / place.relative_path
    if place.length > _MOST_OBJECT_BYTES:
        raise DamagedCheckpoint(f"{path}: {index.fqn}: {place.length} bytes, more than it can need")
    with path.open("rb") as file:
        data = _checked(opened, index.fqn, file, place).numpy().tobytes()
    if not data.startswith(b"PK"):  # torch's older format allocates as much memory as a file demands
        raise DamagedCheckpoint(f"{path}: {index.fqn}: not what torch.save writes")
    try:
        (tree,) = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # bytes may be wrong in any way
        raise DamagedCheckpoint(f"{path}: {index.fqn}: not plain tensors: {line_of(error)}") from None
    return tree


def check_object(opened: Opened, name: str) -> None:
    """Compares an object that nobody needs with its checksum, if it has one. Raises DamagedCheckpoint."""
    place = opened.metadata.storage_data.get(MetadataIndex(name))
    if place is not None and opened.box_sums is not None:
        with (opened.folder / place.relative_path).open("rb") as file:
            _checked(opened, name, file, place)


def _boxes(opened: Opened, indices: Mapping[MetadataIndex, Any]) -> Iterator[tuple[MetadataIndex, Tensor]]:
    """Yields each box that `indices` name, as a tensor, in the order in which the boxes lie in the files."""
    places = opened.metadata.storage_data
    if lacking := next((index for index in indices if index not in places), None):
        raise DamagedCheckpoint(f"{opened.folder}: {lacking.fqn}: no box at {tuple(lacking.offset or ())}")
    order = sorted(indices, key=lambda index: (places[index].relative_path, places[index].offset))
    with ExitStack() as stack:
        name = ""
        for index in order:
            place = places[index]
            if place.relative_path != name:
                stack.close()
                name = place.relative_path
                file = stack.enter_context((opened.folder / name).open("rb", buffering=0))
            yield index, _values(opened, index, _checked(opened, index.fqn, file, place), opened.folder / name)


def _values(opened: Opened, index: MetadataIndex, data: Tensor, path: Path) -> Tensor:
    """The values of a box, as a tensor over `data`, the bytes that the box is stored as."""
    stored = opened.metadata.state_dict_metadata[index.fqn]
    assert isinstance(stored, TensorStorageMetadata)
    dtype = stored.properties.dtype
    shape = next(tuple(chunk.sizes) for chunk in stored.chunks if chunk.offsets == index.offset)
    view = memoryview(data.numpy())
    try:
        start = values_offset(BytesFile(len(view), lambda at, size: view[at : at + size]), shape, dtype)
    except ValueError as error:
        raise DamagedCheckpoint(f"{path}: {index.fqn}: {error}") from None
    values = data[start : start + torch.Size(shape).numel() * dtype.itemsize]
    if start % dtype.itemsize:  # torch.save puts them at a multiple of 64
        values = values.clone()
    return values.view(dtype).view(shape)


def _checked(opened: Opened, name: str, file: BinaryIO | io.FileIO, place: _StorageInfo) -> Tensor:
    """The bytes of a box, compared with its checksum. Raises DamagedCheckpoint naming file and tensor."""
    path, end = opened.folder / place.relative_path, file.seek(0, io.SEEK_END)
    if end < place.offset + place.length:
        raise DamagedCheckpoint(
            f"{path}: {name}: truncated: its box ends at byte {place.offset + place.length}, the file at {end}"
        )
    data, total = torch.empty(place.length, dtype=torch.uint8), new_sum()
    view, done = memoryview(data.numpy()), 0
    file.seek(place.offset)
    while done < len(view):
        count = file.readinto(view[done : done + _AT_ONCE_BYTES])  # type: ignore[union-attr]
        if not count:
            raise DamagedCheckpoint(f"{path}: {name}: truncated while it was read")
        if opened.box_sums is not None:
            total.update(view[done : done + count])
        done += count
    opened.check_box(name, place.relative_path, place.offset, place.length, total.hexdigest())
    return data
