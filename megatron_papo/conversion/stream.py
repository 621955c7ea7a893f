"""Rows of many parameters through a few buffers: one thread reads ahead, this one casts and hashes, one writes.

The memory taken is that of the buffers, whatever the size of a tensor: `SHARES` chunks at most. Reading, hashing and
writing release the interpreter's lock, so the three run at once. Hashes are of a parameter in both of its forms, the
one parameter and the Hugging Face tensors that it is made of, and come from one walk over the parameter's rows. Where
that walk meets the rows of a tensor in another order than the tensor's own (queries, keys and values of the vision
tower, which a parameter holds per head), the tensor is read once more.
"""

from __future__ import annotations

import hashlib
import queue
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_papo.conversion.stores import (
    Files,
    Span,
    Store,
    chunks,
    in_order,
    read_rows,
    source_spans,
    spans,
    view,
    width,
)
from megatron_papo.model.parameter_map import ParameterEntry

HASH = "sha256"
CHUNK_BYTES = 2 * 2**20
"""The size of a buffer: large enough for the disk, small enough to be hashed and written while it is in the caches."""
_SLOTS = 8
_READ_AHEAD = 3
SHARES = 2 * _SLOTS + 6
"""The most chunks in memory: two buffers a slot; parts of rows, and what counting and reading again need."""
BITS = {2: torch.int16, 4: torch.int32}
"""The integer type whose values are the bit patterns of floats of so many bytes."""

Write = Callable[[ParameterEntry, int, int, Tensor], None]
"""Called with a parameter, the first row, the row behind the last, and the bytes of these rows."""


@dataclass(frozen=True)
class ParameterCopy:
    """A parameter to read, and the dtype to cast it to."""

    entry: ParameterEntry
    dtype: torch.dtype
    other: torch.dtype


@dataclass(frozen=True)
class Wants:
    """Which forms of a parameter are hashed, as read and as cast."""

    read_parameter: bool = True
    read_sources: bool = True
    cast_parameter: bool = True
    cast_sources: bool = True


@dataclass(frozen=True)
class Forms:
    """Hexadecimal hashes of the values of one parameter, in both of its forms."""

    parameter: tuple[str, ...]
    """One hash; none where it was not wanted."""
    sources: tuple[str, ...]
    """One hash a Hugging Face tensor, in the order of `entry.sources`; none where they were not wanted."""


@dataclass(frozen=True)
class Outcome:
    """What one parameter came to: its hashes, and how many values the cast rounded."""

    entry: ParameterEntry
    read: Forms
    cast: Forms
    """The same as `read` where nothing was cast."""
    changed: int
    """The number of values that the cast rounded."""


class Hasher:
    """Hashes one parameter in one dtype as its rows stream by."""

    def __init__(self, entry: ParameterEntry, itemsize: int, parameter: bool = True, sources: bool = True):
        self._entry, self._row_bytes = entry, width(entry) * itemsize
        self._wants_parameter, self._wants_sources = parameter, sources
        self._same = len(entry.runs) == 1
        self._ordered = in_order(entry)
        self._whole = hashlib.new(HASH)
        self._parts = [hashlib.new(HASH) for _ in entry.sources]

    def updates(self, start: int, stop: int, data: memoryview) -> list[Callable[[], None]]:
        """What has to be called, on any threads, to add rows `start : stop`; rows come in order and each once."""
        calls: list[Callable[[], None]] = []
        if self._wants_parameter or self._same:
            calls.append(lambda: self._whole.update(data))
        if self._wants_sources and self._ordered and not self._same:
            calls.append(lambda: self._update_parts(start, stop, data))
        return calls

    def _update_parts(self, start: int, stop: int, data: memoryview) -> None:
        for span in spans(self._entry, start, stop):
            first = (span.row - start) * self._row_bytes
            self._parts[span.source].update(data[first : first + span.length * self._row_bytes])

    def finish(self, read: Callable[[Span], memoryview], most_bytes: int) -> Forms:
        """The hashes. `read` gives rows of the parameter again, at most `most_bytes` at once but at least one row."""
        if self._wants_sources and not self._ordered:
            step = max(1, most_bytes // self._row_bytes)
            for source, tensor in enumerate(self._entry.sources):
                for span in source_spans(self._entry, source, 0, tensor.shape[0]):
                    for done in range(0, span.length, step):
                        part = Span(source, span.start + done, span.row + done, min(step, span.length - done))
                        self._parts[source].update(read(part))
        whole = (self._whole.hexdigest(),)
        parts = whole if self._same else tuple(part.hexdigest() for part in self._parts)
        return Forms(whole if self._wants_parameter else (), parts if self._wants_sources else ())


class _Slot:
    """A buffer of one chunk, and a second one where the chunk is cast."""

    def __init__(self, num_bytes: int):
        self.raw = torch.empty(num_bytes, dtype=torch.uint8)
        self.cast: Tensor | None = None


class Stream:
    """One run over parameters of `store`.

    `write` is called with the rows of a parameter and then `done` with its outcome, in order and on one other thread.
    `moved` is given the number of bytes that went through, counted in the dtype they were cast to. `run` raises the
    error of any thread.
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
        """Reads the parameters of `jobs` in this order; returns when all of them are hashed and written."""
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
        """Two forms mean two hashes of the same bytes; every second one is computed on another thread."""
        calls = self._read_hash.updates(start, stop, view(raw))
        if self._cast_hash is not self._read_hash:
            calls += self._cast_hash.updates(start, stop, view(data))
        others = [self._hashers.submit(call) for call in calls[1::2]]
        for call in calls[::2]:
            call()
        for future in others:
            future.result()

    def _cast(self, job: ParameterCopy, raw: Tensor, slot: _Slot) -> Tensor:
        """Casts to the nearest value, ties to even, and counts the values that changed."""
        if slot.cast is None:
            slot.cast = torch.empty(self._chunk_bytes, dtype=torch.uint8)
        values = raw.view(job.dtype)
        data = slot.cast[: values.numel() * job.other.itemsize]
        data.view(job.other).copy_(values)
        if not exact(job.dtype, job.other):
            back = data.view(job.other).to(job.dtype)
            bits = BITS[job.dtype.itemsize]
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
    """Whether a cast from `dtype` to `other` keeps every value, so that casting back gives the same bits."""
    return dtype == other or other == torch.float32
