"""Reads the header of a safetensors file, which says where each tensor lies.

A file is eight bytes with the length of the header, the header (JSON: dtype, shape and range of every tensor), and
the tensors one after the other.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_papo.files.json_keys import shown, shown_name

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_MAX_HEADER_BYTES = 100 * 2**20
"""The largest header that is read: the limit of the safetensors library."""
_MAX_AXES = 8


@dataclass(frozen=True)
class Stored:
    """Where a tensor is stored: its bytes begin at `offset` of `file`."""

    file: str
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(file: Path) -> dict[str, Stored]:
    """Every tensor of the file by name.

    Raises ValueError naming the file, and the tensor at fault if there is one. The tensors must fill the file, one
    after the other, with nothing between and behind them.
    """
    size = file.stat().st_size
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError(f"{file}: not a whole safetensors file: {size} bytes end within its header")
        header = _parsed(file, handle.read(length))
    header.pop("__metadata__", None)
    tensors = [(name, *_stored(file, name, facts, 8 + length)) for name, facts in header.items()]
    tensors.sort(key=lambda item: (item[1].offset, item[2]))
    end = 8 + length
    for name, stored, stop in tensors:
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
    return {name: stored for name, stored, _ in tensors}


def _parsed(file: Path, text: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        tree = dict(pairs)
        if len(tree) < len(pairs):
            raise ValueError("a name stands in it twice")
        return tree

    try:
        header = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:  # bytes that are not text, numbers of 5,000 digits
        raise ValueError(f"{file}: not a safetensors file: its header is not readable: {error}") from None
    if not isinstance(header, dict):
        raise ValueError(f"{file}: not a safetensors file: its header is not readable: no mapping of names")
    return header


def _stored(file: Path, name: str, facts: Any, base: int) -> tuple[Stored, int]:
    """The tensor that `facts` of the header describe, and the place of the byte behind it."""
    try:
        dtype, shape, (start, stop) = facts["dtype"], tuple(facts["shape"]), facts["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{file}: {shown_name(name)}: its header is not readable: {shown(facts)}") from None
    if not isinstance(dtype, str) or dtype not in DTYPES:
        kind = shown_name(dtype) if isinstance(dtype, str) else shown(dtype)
        raise ValueError(f"{file}: {shown_name(name)}: is {kind}; {', '.join(DTYPES)} are what can be read")
    whole = len(shape) <= _MAX_AXES and all(type(number) is int and number >= 0 for number in (*shape, start, stop))
    if not whole or start > stop:
        raise ValueError(f"{file}: {shown_name(name)}: its header is not readable: {shown(facts)}")
    stored = Stored(file.name, base + start, DTYPES[dtype], shape)
    if stored.num_bytes != stop - start:
        raise ValueError(f"{file}: {shown_name(name)}: {stop - start} bytes are not {dtype} {shape}")
    return stored, base + stop
