"""`.metadata`, the list of what a checkpoint holds, as torch.distributed.checkpoint writes it: a pickle.

It is read as data (pickle_reading.py) and then made into torch's own `Metadata`, after every value was checked to have
the right type and to lie within bounds. Fields that this package does not use are left out: the planner's data, and
where and by which call the file was written.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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

from megatron_papo.checkpoint.archive.pickle_reading import PickledObject, line_of, read_pickle
from megatron_papo.distributed.agreement import DamagedCheckpoint

METADATA_FILE = ".metadata"
COMMON_STATE = "common_state/shard_0_1"
"""The object in which Megatron-Core looks for what is no tensor. It has to be there; this package leaves it empty."""
_LARGEST = 2**62
_LONGEST_NAME = 1000
_TORCH = "torch.distributed.checkpoint"
_CLASSES = frozenset(
    {
        *((f"{_TORCH}.metadata", name) for name in (
            "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "MetadataIndex",
            "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
        )),
        (f"{_TORCH}.filesystem", "_StorageInfo"),
        ("torch", "Size"), ("torch.serialization", "_get_layout"),
        ("pathlib", "PosixPath"), ("pathlib", "PurePosixPath"),  # where it was written
        # what Megatron-Core's own saving adds
        ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"),
        ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"),
    }
)  # fmt: skip
_CONSTANTS: dict[tuple[str, str], Any] = {
    **{("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    ("collections", "OrderedDict"): dict,
}


@dataclass(frozen=True)
class StoredBox:
    """A rectangular part of a tensor, and the bytes of a file that store it."""

    offsets: torch.Size
    """Where the box begins in the tensor, along each axis."""
    sizes: torch.Size
    file: str
    """The file's name within the checkpoint folder."""
    start: int
    """The byte at which the box begins in the file."""
    num_bytes: int


@dataclass(frozen=True)
class StoredTensor:
    """A whole tensor and the boxes that it was cut into."""

    dtype: torch.dtype
    shape: torch.Size
    boxes: Sequence[StoredBox]


def write_metadata(folder: Path, tensors: Mapping[str, StoredTensor], common_file: str) -> bytes:
    """Writes `.metadata`, which lists `tensors` by name, and the empty common state as `common_file`.

    Returns the bytes of the common state.
    """
    common = io.BytesIO()
    torch.save([{}], common)
    (folder / common_file).write_bytes(common.getvalue())
    described: dict[str, Any] = {COMMON_STATE: BytesStorageMetadata()}
    places = {MetadataIndex(COMMON_STATE): _StorageInfo(common_file, 0, len(common.getvalue()))}
    for name, tensor in tensors.items():
        chunks = []
        for index, box in enumerate(tensor.boxes):
            chunks.append(ChunkStorageMetadata(box.offsets, box.sizes))
            places[MetadataIndex(name, box.offsets, index)] = _StorageInfo(box.file, box.start, box.num_bytes)
        described[name] = TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), tensor.shape, chunks)
    metadata = Metadata(described, storage_data=places, version=CURRENT_DCP_VERSION)
    (folder / METADATA_FILE).write_bytes(pickle.dumps(metadata))
    return common.getvalue()


def parse_metadata(data: bytes, file: Path) -> Metadata:
    """The list of a checkpoint from the bytes of its `.metadata`.

    Raises DamagedCheckpoint, naming `file`, for bytes that are no such list, and for a list that names files outside of
    the checkpoint's folder.
    """
    try:
        fields = _record(read_pickle(data, _CLASSES, _CONSTANTS), "Metadata").fields()
        described = {_text(name): _description(name, each) for name, each in fields["state_dict_metadata"].items()}
        places = dict(_place(index, info) for index, info in fields["storage_data"].items())
    except Exception as error:  # a stranger's values may fail anywhere
        raise DamagedCheckpoint(f"{file}: not the metadata of a checkpoint: {line_of(error)}") from None
    return Metadata(described, storage_data=places)


def _description(name: str, record: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if type(record).__name__ == "BytesStorageMetadata":
        return BytesStorageMetadata()
    fields = _record(record, "TensorStorageMetadata").fields()
    dtype, *_ = _record(fields["properties"], "TensorProperties").state
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name}: {dtype!r} is no dtype")
    size = _size(fields["size"])
    chunks = [_chunk(name, each, size) for each in fields["chunks"]]
    if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(size):
        raise ValueError(f"{name}: its boxes do not cover it once")
    return TensorStorageMetadata(TensorProperties(dtype), size, chunks)


def _chunk(name: str, record: Any, whole: torch.Size) -> ChunkStorageMetadata:
    fields = _record(record, "ChunkStorageMetadata").fields()
    offsets, sizes = _size(fields["offsets"]), _size(fields["sizes"])
    inside = len(offsets) == len(sizes) == len(whole)
    if not inside or any(start + length > end for start, length, end in zip(offsets, sizes, whole)):
        raise ValueError(f"{name}: a box of {tuple(sizes)} at {tuple(offsets)} is outside of {tuple(whole)}")
    return ChunkStorageMetadata(offsets, sizes)


def _place(index: Any, info: Any) -> tuple[MetadataIndex, _StorageInfo]:
    key, place = _record(index, "MetadataIndex").fields(), _record(info, "_StorageInfo").fields()
    name, file = _text(key["fqn"]), _text(place["relative_path"])
    if file in ("", ".", "..") or any(character in file for character in "/\\\0"):
        raise ValueError(f"{name}: {file!r} is no file of the folder")
    if place.get("transform_descriptors"):
        raise ValueError(f"{name}: no plain box")
    offset = key.get("offset")
    where = MetadataIndex(name, None if offset is None else _size(offset))
    return where, _StorageInfo(file, _count(place["offset"]), _count(place["length"]))


def _record(value: Any, name: str) -> PickledObject:
    if not isinstance(value, PickledObject) or type(value).__name__ != name:
        raise TypeError(f"{type(value).__name__} instead of {name}")
    return value


def _size(value: Any) -> torch.Size:
    (numbers,) = _record(value, "Size").arguments
    if not isinstance(numbers, Iterable):
        raise TypeError(f"a size of {type(numbers).__name__}")
    size = torch.Size([_count(number) for number in numbers])
    if math.prod(size) > _LARGEST:
        raise ValueError(f"a size of {tuple(size)}")
    return size


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= _LARGEST:
        raise TypeError(f"{str(value)[:40]} instead of a count")
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise TypeError(f"{type(value).__name__} instead of a text")
    if len(value) > _LONGEST_NAME or not value.isprintable():
        raise ValueError(f"a name of {len(value)} characters that no tensor has")
    return value
