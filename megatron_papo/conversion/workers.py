"""The workers of one conversion among themselves, and the progress that the first of them shows.

A worker works by itself, or is one of the ranks that a launcher started. Workers exchange no tensors, only what each
has done. No Megatron is needed: they use a gloo group and its key-value store. What rank 0 does alone fails on all of
them together (distributed/agreement.py). A worker that fails amid its own files tells the others through the store, at
which they look as they work: they share no collective until all files are done. Progress is a bar on a terminal, and
elsewhere a line every few seconds.
"""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as RichProgress

from megatron_papo.distributed.agreement import InputFailed, on_first_rank
from megatron_papo.distributed.exchange import gather_objects
from megatron_papo.distributed.rendezvous import world_store

_TIMEOUT = datetime.timedelta(days=7)
"""Workers wait for the slowest for as long as this; a worker that died is noticed at once."""
_POLL_S = 0.2
UPDATE_S = 0.2
"""Seconds between two updates of what all workers have done."""
_LINE_S = 5.0
GB = 1e9

Value = TypeVar("Value")


def reason_of(error: ValueError | OSError) -> str:
    """The error in one line; for an OSError its file and what the system says."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


class Workers:
    """This worker, number `rank` of `size`. Used in a `with` block, at whose end it waits for the others."""

    def __init__(self) -> None:
        self.rank, self.size = 0, 1
        self._bytes = 0
        self._store: Any = None
        self._group: dist.ProcessGroup | None = None
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            self._store = world_store(_TIMEOUT.total_seconds())
            dist.init_process_group(
                "gloo", store=dist.PrefixStore("gloo", self._store), rank=self.rank, world_size=self.size,
                timeout=_TIMEOUT,
            )  # fmt: skip
            self._group = dist.group.WORLD

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._store is not None and kind is None:
            dist.barrier()
            dist.destroy_process_group()

    def gather(self, value: Value) -> list[Value]:
        """The values of all workers, by rank, on every worker."""
        return [value] if self._group is None else gather_objects(value, self._group)

    def first(self, work: Callable[[], Value]) -> Value:
        """What `work` returns on rank 0, on every worker; its ValueError or OSError is a ValueError on every worker."""

        def in_one_line() -> Value:
            try:
                return work()
            except OSError as error:
                raise ValueError(reason_of(error)) from error

        try:
            return on_first_rank(self._group, in_one_line)
        except InputFailed as failed:
            raise ValueError(failed.faults[0].reason) from None

    def fail(self, reason: str) -> None:
        """Ends the other workers, with this worker's reason, at their next `advance`."""
        if self._store is not None:
            self._store.set("reason", reason)
            self._store.add("failed", 1)

    def advance(self, num_bytes: int) -> int:
        """Adds to the bytes that this worker has done; returns those of all workers.

        Raises ValueError once a worker has failed.
        """
        if self._store is not None:
            if self._store.add("failed", 0):
                raise ValueError(self._store.get("reason").decode())
            return self._store.add("bytes", num_bytes)
        self._bytes += num_bytes
        return self._bytes

    def wait_for_all(self, meanwhile: Callable[[], None]) -> None:
        """Returns when every worker has called this; calls `meanwhile` several times a second until then."""
        if self._store is None:
            return
        arrival = dist.barrier(async_op=True)
        assert arrival is not None
        while not arrival.is_completed():
            meanwhile()
            time.sleep(_POLL_S)
        arrival.wait()


class ByteProgress:
    """The bytes that all workers together have done of `total`; rank 0 shows them.

    `moved` may be called as often as one likes.
    """

    def __init__(self, workers: Workers, what: str, total: int, done: int = 0):
        self._workers, self._what, self._total, self._before = workers, what, total, done
        self._uncounted, self._console = 0, Console()
        self._began = self._printed = self._updated = time.monotonic()
        self.peak_anonymous = 0
        """The most bytes of this process that no file backs, as often as it was measured."""
        self._bar: RichProgress | None = None

    def __enter__(self) -> ByteProgress:
        if self._workers.rank == 0 and self._console.is_terminal:
            columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            self._bar = RichProgress(TextColumn("{task.description}"), *columns, console=self._console)
            self._bar.start()
            self._task = self._bar.add_task(self._what, total=self._total, completed=self._before)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.update(last=True)
        if self._bar is not None:
            self._bar.stop()

    def moved(self, num_bytes: int) -> None:
        """Counts bytes that this worker has done. Raises ValueError once a worker has failed."""
        self._uncounted += num_bytes
        if time.monotonic() - self._updated >= UPDATE_S:
            self.update()

    def update(self, last: bool = False) -> None:
        """Exchanges what was done with the other workers, and shows it. Raises ValueError once a worker has failed."""
        self._updated = time.monotonic()
        self.peak_anonymous = max(self.peak_anonymous, memory("RssAnon"))
        done = self._workers.advance(self._uncounted)
        self._uncounted = 0
        if self._workers.rank:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=self._before + done)
        elif last or self._updated - self._printed >= _LINE_S:
            self._printed = self._updated
            self._console.print(self._line(done), highlight=False)

    def _line(self, done: int) -> str:
        speed = done / max(self._updated - self._began, 1e-6)
        so_far = self._before + done
        left = f", {(self._total - so_far) / speed:.0f} s left" if speed and so_far < self._total else ""
        return f"{self._what}: {decimal(so_far)} of {decimal(self._total)}, {decimal(int(speed))}/s{left}"


def memory(key: str) -> int:
    """Bytes of this process by a key of /proc/self/status: VmRSS, VmHWM (the highest VmRSS so far), RssAnon.

    0 where the system has no such file.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)
