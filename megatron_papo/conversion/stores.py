"""Where a parameter's rows lie in files, and reading and writing them there through a buffer.

A store says where (`Strip`); what it says holds for the files that are read and for those that are planned and yet to
be written. Bytes move with pread and pwrite into memory that the caller owns: no file is mapped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_papo.conversion.box_sums import Box
from megatron_papo.conversion.spans import width
from megatron_papo.model.parameter_map import ParameterEntry

_FORGET_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Strip:
    """Rows `row : row + length` and columns `column : column + width` of a parameter, one after the other in `file`."""

    file: str
    offset: int
    row: int
    length: int
    column: int
    width: int
    box: Box | None = None
    """Of a checkpoint: the one that it is a part of."""


class Store(Protocol):
    """The weights of one model in a folder."""

    folder: Path

    def dtype(self, entry: ParameterEntry) -> torch.dtype: ...

    def strips(self, entry: ParameterEntry, start: int, stop: int) -> Iterator[Strip]:
        """Of rows `start : stop` of the parameter."""
        ...

    def check(self, files: Files, entry: ParameterEntry, strip: Strip, data: memoryview) -> None:
        """Told of what is read, a strip at a time; raises ValueError for what is known not to be what was written."""
        ...


class Files:
    """Open files of one folder. Use it as a context. Errors are ValueErrors that name the file."""

    def __init__(self, folder: Path, flags: int = os.O_RDONLY):
        self.folder, self._flags = folder, flags
        self._open: dict[str, int] = {}
        self._cached: dict[str, int] = {}

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def handle(self, name: str) -> int:
        if name not in self._open:
            try:
                self._open[name] = os.open(self.folder / name, self._flags, 0o644)
            except OSError as error:
                raise ValueError(f"{self.folder / name}: {error.strerror}") from None
        return self._open[name]

    def read(self, name: str, offset: int, into: memoryview, what: str) -> None:
        """Fills `into`; `what` is the tensor that an error names."""
        done = 0
        while done < len(into):
            try:
                count = os.preadv(self.handle(name), [into[done:]], offset + done)
            except OSError as error:
                raise ValueError(f"{self.folder / name}: {what}: {error.strerror}") from None
            if not count:
                raise ValueError(f"{self.folder / name}: {what}: truncated: the file ends at byte {offset + done}")
            done += count
        self._forget_behind(name, offset, done)

    def some(self, name: str, offset: int, size: int) -> bytes:
        """As `read`, of a few bytes that are no tensor's values."""
        data = bytearray(size)
        self.read(name, offset, memoryview(data), "around its values")
        return bytes(data)

    def _forget_behind(self, name: str, offset: int, count: int) -> None:
        """What was read is not read again soon: its pages are free for others, and for what is read next."""
        self._cached[name] = self._cached.get(name, 0) + count
        if self._cached[name] >= _FORGET_BYTES:
            os.posix_fadvise(self.handle(name), 0, offset, os.POSIX_FADV_DONTNEED)
            self._cached[name] = 0

    def sync(self, name: str) -> None:
        """Forces what was written to disk; its pages too are free for others then."""
        os.fdatasync(self.handle(name))
        os.posix_fadvise(self.handle(name), 0, 0, os.POSIX_FADV_DONTNEED)

    def write(self, name: str, offset: int, data: memoryview | bytes) -> None:
        view, done = memoryview(data), 0
        while done < len(view):
            try:
                done += os.pwrite(self.handle(name), view[done:], offset + done)
            except OSError as error:
                raise ValueError(f"{self.folder / name}: {error.strerror}") from None


def view(data: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, without a copy."""
    return memoryview(data.view(-1).view(torch.uint8).numpy())


def read_rows(files: Files, store: Store, entry: ParameterEntry, start: int, stop: int, into: Tensor) -> None:
    """Rows `start : stop` of a parameter into `into`, bytes of exactly that size."""
    row_bytes = width(entry) * (size := store.dtype(entry).itemsize)
    for strip in store.strips(entry, start, stop):
        first = (strip.row - start) * row_bytes
        if strip.width == width(entry):
            whole = view(into)[first : first + strip.length * row_bytes]
            files.read(strip.file, strip.offset, whole, entry.name)
            store.check(files, entry, strip, whole)
            continue
        part = torch.empty(strip.length, strip.width * size, dtype=torch.uint8)
        files.read(strip.file, strip.offset, view(part), entry.name)
        store.check(files, entry, strip, view(part))
        rows = into[first : first + strip.length * row_bytes].view(strip.length, row_bytes)
        rows[:, strip.column * size : (strip.column + strip.width) * size] = part


def write_rows(
    files: Files, store: Store, entry: ParameterEntry, start: int, stop: int, data: Tensor
) -> list[tuple[Strip, memoryview]]:
    """The same bytes to where a planned store has them, and what was written where; its strips are whole rows."""
    row_bytes, written = width(entry) * store.dtype(entry).itemsize, []
    for strip in store.strips(entry, start, stop):
        first = (strip.row - start) * row_bytes
        values = view(data)[first : first + strip.length * row_bytes]
        files.write(strip.file, strip.offset, values)
        written.append((strip, values))
    return written
