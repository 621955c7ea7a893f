"""The rows of a parameter: which rows of which Hugging Face tensors they are, and where they lie in files.

A parameter is a matrix here: its rows are those of the table of parameters (model/parameter_map.py), and a row is
everything else of its shape, one value for a vector. A parameter is made of rows of one or several Hugging Face tensors
(`Span`). Rows that lie one after the other in a file are a `Strip`. A `Store` says where the strips of a parameter are;
what it says holds for files that exist and for files that are planned and yet to be written. Bytes move with preadv and
pwrite to and from memory that the caller owns: no file is mapped.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_papo.model.parameter_map import ParameterEntry

_FORGET_BYTES = 64 * 2**20
"""After so many bytes were read of a file, the system may drop their pages."""


@dataclass(frozen=True)
class Span:
    """Rows `start : start + length` of one source tensor are the rows of the parameter from `row` on."""

    source: int
    start: int
    row: int
    length: int


def spans(entry: ParameterEntry, start: int, stop: int) -> Iterator[Span]:
    """The parts of source tensors that make up rows `start : stop` of the parameter, in the parameter's order."""
    row = 0
    for run in entry.runs:
        first, last = max(start, row), min(stop, row + run.length)
        if last > first:
            yield Span(run.source, run.start + first - row, first, last - first)
        row += run.length


def source_spans(entry: ParameterEntry, source: int, start: int, stop: int) -> list[Span]:
    """Where rows `start : stop` of one source tensor lie in the parameter, in the source's order."""
    parts, row = [], 0
    for run in entry.runs:
        first, last = max(start, run.start), min(stop, run.start + run.length)
        if run.source == source and last > first:
            parts.append(Span(source, first, row + first - run.start, last - first))
        row += run.length
    return sorted(parts, key=lambda span: span.start)


def in_order(entry: ParameterEntry) -> bool:
    """Whether a walk over the parameter's rows meets the rows of each source tensor in the source's own order."""
    reached = [0] * len(entry.sources)
    for run in entry.runs:
        if run.start != reached[run.source]:
            return False
        reached[run.source] += run.length
    return True


def width(entry: ParameterEntry) -> int:
    """The number of values in a row."""
    return math.prod(entry.shape[1:])


def num_values(entry: ParameterEntry) -> int:
    """The number of values in the whole parameter."""
    return math.prod(entry.shape)


def chunks(num_rows: int, row_bytes: int, most_bytes: int) -> Iterator[tuple[int, int]]:
    """Ranges (start, stop) of rows that cover all of them, each as many as `most_bytes` hold, but at least one row."""
    step = max(1, most_bytes // row_bytes)
    for start in range(0, num_rows, step):
        yield start, min(start + step, num_rows)


@dataclass(frozen=True)
class Box:
    """A stored slice of a parameter, in a checkpoint: rows `row : row + length`, columns `column : column + width`.

    It takes `size` bytes of `file` from `offset` on.
    """

    file: str
    offset: int
    size: int
    row: int
    length: int
    column: int
    width: int
    values: int | None
    """The byte of the file at which the values begin; None while nobody has looked it up."""


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
    """In a checkpoint: the box that the strip is a part of."""


class Store(Protocol):
    """The weights of one model in a folder."""

    folder: Path

    def dtype(self, entry: ParameterEntry) -> torch.dtype:
        """The dtype of a parameter, which all of its tensors have."""
        ...

    def strips(self, entry: ParameterEntry, start: int, stop: int) -> Iterator[Strip]:
        """Where rows `start : stop` of the parameter lie."""
        ...

    def check(self, files: Files, entry: ParameterEntry, strip: Strip, data: memoryview) -> None:
        """Is given what was read, a strip at a time; raises ValueError for bytes known not to be those written."""
        ...


def parameter_bytes(store: Store, entry: ParameterEntry) -> int:
    """Bytes that the values of a parameter take in `store`."""
    return num_values(entry) * store.dtype(entry).itemsize


class Files:
    """Open files of one folder, closed at the end of a `with` block. Errors are ValueErrors that name the file."""

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
        """The file descriptor of a file, which is opened at the first call."""
        if name not in self._open:
            try:
                self._open[name] = os.open(self.folder / name, self._flags, 0o644)
            except OSError as error:
                raise ValueError(f"{self.folder / name}: {error.strerror}") from None
        return self._open[name]

    def read(self, name: str, offset: int, into: memoryview, what: str) -> None:
        """Fills `into` with the bytes from `offset` on; `what` is the tensor that an error names."""
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
        """A few bytes that are not values of a tensor."""
        data = bytearray(size)
        self.read(name, offset, memoryview(data), "around its values")
        return bytes(data)

    def _forget_behind(self, name: str, offset: int, count: int) -> None:
        """Bytes that were read are not read again soon, so the system may use their pages for others."""
        self._cached[name] = self._cached.get(name, 0) + count
        if self._cached[name] >= _FORGET_BYTES:
            os.posix_fadvise(self.handle(name), 0, offset, os.POSIX_FADV_DONTNEED)
            self._cached[name] = 0

    def sync(self, name: str) -> None:
        """Forces what was written to disk; the system may use its pages for others then."""
        os.fdatasync(self.handle(name))
        os.posix_fadvise(self.handle(name), 0, 0, os.POSIX_FADV_DONTNEED)

    def write(self, name: str, offset: int, data: memoryview | bytes) -> None:
        """Writes all of `data` to the file, from byte `offset` on."""
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
    """Reads rows `start : stop` of a parameter into `into`, a uint8 tensor of exactly that size."""
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
    """Writes rows `start : stop` of a parameter to where a planned store has them; its strips are whole rows.

    Returns the strips that were written, each with its bytes.
    """
    row_bytes, written = width(entry) * store.dtype(entry).itemsize, []
    for strip in store.strips(entry, start, stop):
        first = (strip.row - start) * row_bytes
        values = view(data)[first : first + strip.length * row_bytes]
        files.write(strip.file, strip.offset, values)
        written.append((strip, values))
    return written
