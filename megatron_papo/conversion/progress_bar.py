"""How many bytes are done, for whoever watches: a bar on a terminal, elsewhere a line every few seconds."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as RichProgress

from megatron_papo.conversion.workers import Workers

_UPDATE_S = 0.2
_LINE_S = 5.0
GB = 1e9


class ByteProgress:
    """Of the whole group of workers; rank 0 shows it. `moved` may be called as often as one likes."""

    def __init__(self, workers: Workers, what: str, total: int, done: int = 0):
        self._crew, self._what, self._total, self._before = workers, what, total, done
        self._waiting, self._console = 0, Console()
        self._began = self._said = self._asked = time.monotonic()
        self.peak_anonymous = 0
        self._bar: RichProgress | None = None

    def __enter__(self) -> ByteProgress:
        if self._crew.rank == 0 and self._console.is_terminal:
            columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            self._bar = RichProgress(TextColumn("{task.description}"), *columns, console=self._console)
            self._bar.start()
            self._task = self._bar.add_task(self._what, total=self._total, completed=self._before)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._ask(last=True)
        if self._bar is not None:
            self._bar.stop()

    def moved(self, num_bytes: int) -> None:
        self._waiting += num_bytes
        if time.monotonic() - self._asked >= _UPDATE_S:
            self._ask()

    def look(self) -> None:
        """While this worker waits for others."""
        self._ask()

    def _ask(self, last: bool = False) -> None:
        self._asked = time.monotonic()
        self.peak_anonymous = max(self.peak_anonymous, memory("RssAnon"))
        done = self._crew.advance(self._waiting)
        self._waiting = 0
        if self._crew.rank:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=self._before + done)
        elif last or self._asked - self._said >= _LINE_S:
            self._said = self._asked
            self._console.print(self._line(done), highlight=False)

    def _line(self, done: int) -> str:
        speed = done / max(self._asked - self._began, 1e-6)
        so_far = self._before + done
        left = f", {(self._total - so_far) / speed:.0f} s left" if speed and so_far < self._total else ""
        return f"{self._what}: {decimal(so_far)} of {decimal(self._total)}, {decimal(int(speed))}/s{left}"


def memory(key: str) -> int:
    """Bytes of this process by /proc/self/status: VmRSS, VmHWM (the most VmRSS ever was), RssAnon; 0 elsewhere."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)
