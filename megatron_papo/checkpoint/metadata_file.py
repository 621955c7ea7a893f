"""`.metadata`, the list of what a checkpoint holds, as torch.distributed.checkpoint writes it: a pickle.

Read as data (pickled.py), then made into torch's own `Metadata`, every value of the type and in the bounds that it must
have. Left out is what nothing here asks for: the planner's data, where and by which call it was written.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_papo.checkpoint.pickled import Record, line_of, read_pickle
from megatron_papo.distributed.agreement import DamagedCheckpoint

METADATA_FILE = ".metadata"
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
        # of Megatron-Core's own saving
        ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"),
        ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"),
    }
)  # fmt: skip
_CONSTANTS: dict[tuple[str, str], Any] = {
    **{("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    ("collections", "OrderedDict"): dict,
}


def parse_metadata(data: bytes, file: Path) -> Metadata:
    """Raises DamagedCheckpoint, naming `file`, for what is not the list of a checkpoint, and for one that names files
    which are not in its folder."""
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


def _record(value: Any, name: str) -> Record:
    if not isinstance(value, Record) or type(value).__name__ != name:
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
