"""Rows of many parameters through a few buffers: a thread reads ahead, this one casts and hashes, a thread writes.

Memory is the buffers, whatever the size of a tensor: SHARES chunks at most. Reading, hashing and writing release the
interpreter's lock, so the three run at once.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_papo.conversion.hashing import Forms, Hasher
from megatron_papo.conversion.spans import Span, chunks, width
from megatron_papo.conversion.stores import Files, Store, read_rows, view
from megatron_papo.model.parameter_map import ParameterEntry

CHUNK_BYTES = 2 * 2**20
"""Of a buffer: large enough for the disk, small enough to be hashed and written while it is in the caches."""
_SLOTS = 8
_READ_AHEAD = 3
SHARES = 2 * _SLOTS + 6
"""Chunks that are held at most: a slot's two buffers; pieces of rows, and what counting and reading again need."""
_BITS = {2: torch.int16, 4: torch.int32}

Write = Callable[[ParameterEntry, int, int, Tensor], None]
"""(parameter, first row, row behind the last, their bytes)."""


@dataclass(frozen=True)
class ParameterCopy:
    """A parameter to read, and the dtype to cast it to."""

    entry: ParameterEntry
    dtype: torch.dtype
    other: torch.dtype


@dataclass(frozen=True)
class Wants:
    """Which forms are hashed, as read and as cast."""

    read_parameter: bool = True
    read_sources: bool = True
    cast_parameter: bool = True
    cast_sources: bool = True


@dataclass(frozen=True)
class Outcome:
    entry: ParameterEntry
    read: Forms
    cast: Forms
    """Equal to `read` where nothing was cast."""
    changed: int
    """Values that the cast rounded."""


class _Slot:
    def __init__(self, num_bytes: int):
        self.raw = torch.empty(num_bytes, dtype=torch.uint8)
        self.cast: Tensor | None = None


class Stream:
    """One run over parameters of `store`.

    `write` and then, of each parameter, `done` are called on one other thread, in order; `moved` is told of bytes
    that went through, in the dtype they were cast to. An error of any thread is raised by `run`.
    """

    def __init__(
        self, store: Store, wants: Wants, chunk_bytes: int, done: Callable[[Outcome], None],
        write: Write | None = None, moved: Callable[[int], None] = lambda count: None,
    ):  # fmt: skip
        self._store, self._wants, self._chunk_bytes = store, wants, chunk_bytes
        self._done, self._write, self._moved = done, write, moved
        self._free: queue.Queue[_Slot] = queue.Queue()
        self._pending: deque[tuple[ParameterCopy, int, int, _Slot, Future[None]]] = deque()
        self._written: deque[Future[None]] = deque()

    def run(self, jobs: Sequence[ParameterCopy]) -> None:
        for _ in range(_SLOTS):
            self._free.put(_Slot(self._chunk_bytes))
        reader, writer, self._hashers = (ThreadPoolExecutor(1) for _ in range(3))
        with Files(self._store.folder) as files:
            try:
                steps = self._steps(jobs)
                self._read_ahead(files, steps, reader)
                while self._pending:
                    self._step(files, steps, reader, writer)
                for future in self._written:
                    future.result()
            finally:
                for pool in (reader, writer, self._hashers):
                    pool.shutdown(cancel_futures=True)

    def _steps(self, jobs: Sequence[ParameterCopy]) -> Iterator[tuple[ParameterCopy, int, int]]:
        for job in jobs:
            row_bytes = width(job.entry) * max(job.dtype.itemsize, job.other.itemsize)
            for start, stop in chunks(job.entry.shape[0], row_bytes, self._chunk_bytes):
                yield job, start, stop

    def _read_ahead(
        self, files: Files, steps: Iterator[tuple[ParameterCopy, int, int]], reader: ThreadPoolExecutor
    ) -> None:
        while len(self._pending) < _READ_AHEAD:
            if (step := next(steps, None)) is None:
                return
            job, start, stop = step
            slot = self._free.get()
            into = slot.raw[: (stop - start) * width(job.entry) * job.dtype.itemsize]
            future = reader.submit(read_rows, files, self._store, job.entry, start, stop, into)
            self._pending.append((job, start, stop, slot, future))

    def _step(
        self, files: Files, steps: Iterator[tuple[ParameterCopy, int, int]], reader: ThreadPoolExecutor,
        writer: ThreadPoolExecutor,
    ) -> None:  # fmt: skip
        job, start, stop, slot, future = self._pending.popleft()
        future.result()
        self._read_ahead(files, steps, reader)
        num_values = (stop - start) * width(job.entry)
        raw = slot.raw[: num_values * job.dtype.itemsize]
        data = raw
        if start == 0:
            self._begin(job)
        if job.other != job.dtype:
            data = self._cast(job, raw, slot)
        self._hash(start, stop, raw, data)
        self._written.append(writer.submit(self._put, job.entry, start, stop, data, slot))
        if stop == job.entry.shape[0]:
            self._written.append(writer.submit(self._done, self._finish(files, job)))
        while self._written and self._written[0].done():
            self._written.popleft().result()
        self._moved(data.numel())

    def _begin(self, job: ParameterCopy) -> None:
        wants, same = self._wants, job.dtype == job.other
        self._changed = 0
        self._read_hash = Hasher(
            job.entry, job.dtype.itemsize,
            wants.read_parameter or (same and wants.cast_parameter),
            wants.read_sources or (same and wants.cast_sources),
        )  # fmt: skip
        self._cast_hash = self._read_hash
        if not same:
            self._cast_hash = Hasher(job.entry, job.other.itemsize, wants.cast_parameter, wants.cast_sources)

    def _hash(self, start: int, stop: int, raw: Tensor, data: Tensor) -> None:
        """Two forms are two hashes of the same bytes: half of them on another thread."""
        calls = self._read_hash.updates(start, stop, view(raw))
        if self._cast_hash is not self._read_hash:
            calls += self._cast_hash.updates(start, stop, view(data))
        others = [self._hashers.submit(call) for call in calls[1::2]]
        for call in calls[::2]:
            call()
        for future in others:
            future.result()

    def _cast(self, job: ParameterCopy, raw: Tensor, slot: _Slot) -> Tensor:
        """To the nearest value, of two equally near ones the even one; the values that it changed are counted."""
        if slot.cast is None:
            slot.cast = torch.empty(self._chunk_bytes, dtype=torch.uint8)
        values = raw.view(job.dtype)
        data = slot.cast[: values.numel() * job.other.itemsize]
        data.view(job.other).copy_(values)
        if not exact(job.dtype, job.other):
            back = data.view(job.other).to(job.dtype)
            bits = _BITS[job.dtype.itemsize]
            self._changed += int((back.view(bits) != values.view(bits)).sum())
        return data

    def _put(self, entry: ParameterEntry, start: int, stop: int, data: Tensor, slot: _Slot) -> None:
        try:
            if self._write is not None:
                self._write(entry, start, stop, data)
        finally:
            self._free.put(slot)

    def _finish(self, files: Files, job: ParameterCopy) -> Outcome:
        def read(span: Span) -> memoryview:
            part = torch.empty(span.length * width(job.entry) * job.dtype.itemsize, dtype=torch.uint8)
            read_rows(files, self._store, job.entry, span.row, span.row + span.length, part)
            return view(part)

        def read_cast(span: Span) -> memoryview:
            part = torch.frombuffer(read(span), dtype=job.dtype)
            return view(part.to(job.other))

        forms = self._read_hash.finish(read, self._chunk_bytes)
        if self._cast_hash is self._read_hash:
            return Outcome(job.entry, forms, forms, 0)
        return Outcome(job.entry, forms, self._cast_hash.finish(read_cast, self._chunk_bytes // 2), self._changed)


def exact(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether a cast keeps every value, so that casting back gives the same bits."""
    return dtype == other or other == torch.float32
