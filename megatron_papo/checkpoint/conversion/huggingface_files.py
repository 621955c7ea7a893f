"""The safetensors files of a Hugging Face folder: where each tensor lies, read from headers or planned.

A file is eight bytes with the length of the header, the header (JSON: dtype, shape and range of every tensor), and
the tensors one after the other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_papo.checkpoint.conversion.spans import spans, width
from megatron_papo.checkpoint.conversion.stores import Files, Strip
from megatron_papo.checkpoint.folders import Homes, check_tensors, weight_files
from megatron_papo.checkpoint.names import published_name
from megatron_papo.checkpoint.slices import Entry
from megatron_papo.model.json_keys import shown, shown_name
from megatron_papo.model.shape import ModelShape

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100 * 2**20
"""As the safetensors library has it."""
_MAX_AXES = 8


@dataclass(frozen=True)
class Stored:
    """A tensor's bytes: from `offset` of `file` on."""

    file: str
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class HuggingFaceFiles:
    """The tensors of a folder by published name."""

    def __init__(self, folder: Path, tensors: Mapping[str, Stored]):
        self.folder, self.tensors = folder, tensors

    @classmethod
    def read(cls, folder: Path, shape: ModelShape) -> HuggingFaceFiles:
        """From the headers. Raises ValueError, a line a fault, naming file and tensor."""
        places, homes = weight_files(folder), Homes()
        found: dict[str, Stored] = {}
        for file in places.files:
            for name, stored in read_header(file).items():
                homes.add(name, file, places.index)
                found[published_name(name)] = stored
        shapes = {name: (folder / stored.file, stored.shape) for name, stored in found.items()}
        check_tensors(folder, shapes, shape, places.index)
        return cls(folder, found)

    def dtype(self, entry: Entry) -> torch.dtype:
        """Raises ValueError where the tensors of one parameter differ in it."""
        parts = [self.tensors[source.name] for source in entry.sources]
        for source, part in zip(entry.sources, parts):
            if part.dtype != parts[0].dtype:
                raise ValueError(
                    f"{self.folder / part.file}: {source.name}: is {part.dtype}, {entry.sources[0].name} is "
                    f"{parts[0].dtype}: they are one parameter of the checkpoint and need one dtype"
                )
        return parts[0].dtype

    def check(self, files: Files, entry: Entry, strip: Strip, data: memoryview) -> None:
        """Published folders have no checksums."""

    def strips(self, entry: Entry, start: int, stop: int) -> Iterator[Strip]:
        columns = width(entry)
        for span in spans(entry, start, stop):
            stored = self.tensors[entry.sources[span.source].name]
            offset = stored.offset + span.start * columns * stored.dtype.itemsize
            yield Strip(stored.file, offset, span.row, span.length, 0, columns)


def read_header(file: Path) -> dict[str, Stored]:
    """name -> place of every tensor. They fill the file, one after the other, with nothing between and behind them.

    Raises ValueError naming the file, and the tensor where one is at fault.
    """
    size = file.stat().st_size
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError(f"{file}: not a whole safetensors file: {size} bytes end within its header")
        header = _parsed(file, handle.read(length))
    header.pop("__metadata__", None)
    found = [(name, *_stored(file, name, facts, 8 + length)) for name, facts in header.items()]
    found.sort(key=lambda item: (item[1].offset, item[2]))
    end = 8 + length
    for name, stored, stop in found:
        if stop > size:
            raise ValueError(
                f"{file}: {shown_name(name)}: truncated: not a whole safetensors file: the tensor ends at byte "
                f"{stop}, the file at {size}"
            )
        if stored.offset != end:
            fault = "overlaps the tensor before it" if stored.offset < end else "leaves a gap before it"
            raise ValueError(f"{file}: {shown_name(name)}: begins at byte {stored.offset} instead of {end}: {fault}")
        end = stop
    if end != size:
        raise ValueError(f"{file}: {size - end} bytes follow the last tensor: not a safetensors file")
    return {name: stored for name, stored, _ in found}


def _parsed(file: Path, text: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        tree = dict(pairs)
        if len(tree) < len(pairs):
            raise ValueError("a name stands in it twice")
        return tree

    try:
        header = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:  # bytes that are no text, numbers of 5,000 digits
        raise ValueError(f"{file}: not a safetensors file: its header is not readable: {error}") from None
    if not isinstance(header, dict):
        raise ValueError(f"{file}: not a safetensors file: its header is not readable: no mapping of names")
    return header


def _stored(file: Path, name: str, facts: Any, base: int) -> tuple[Stored, int]:
    """The tensor, and the byte behind it, as the header has them."""
    try:
        dtype, shape, (start, stop) = facts["dtype"], tuple(facts["shape"]), facts["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{file}: {shown_name(name)}: its header is not readable: {shown(facts)}") from None
    if not isinstance(dtype, str) or dtype not in DTYPES:
        kind = shown_name(dtype) if isinstance(dtype, str) else shown(dtype)
        raise ValueError(f"{file}: {shown_name(name)}: is {kind}; {', '.join(DTYPES)} can be converted")
    whole = len(shape) <= _MAX_AXES and all(type(number) is int and number >= 0 for number in (*shape, start, stop))
    if not whole or start > stop:
        raise ValueError(f"{file}: {shown_name(name)}: its header is not readable: {shown(facts)}")
    stored = Stored(file.name, base + start, DTYPES[dtype], shape)
    if stored.num_bytes != stop - start:
        raise ValueError(f"{file}: {shown_name(name)}: {stop - start} bytes are not {dtype} {shape}")
    return stored, base + stop


def plan_file(name: str, entries: list[Entry], dtypes: Mapping[str, torch.dtype]) -> tuple[dict[str, Stored], bytes]:
    """The places of the tensors of `entries` in one file, one after the other, and the bytes before them."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at, places = 0, {}
    for entry in entries:
        for source in entry.sources:
            stored = places[source.name] = Stored(name, at, dtypes[entry.name], source.shape)
            facts = {"dtype": NAMES[stored.dtype], "shape": list(source.shape)}
            header[source.name] = {**facts, "data_offsets": [at, at := at + stored.num_bytes]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    placed = {key: Stored(name, base + part.offset, part.dtype, part.shape) for key, part in places.items()}
    return placed, len(text).to_bytes(8, "little") + text
