"""Measures time and memory of every stage of a step, shows the stage's progress, and reports it to the watchdog.

Progress is what a stage reports, and every stage that begins or ends.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from megatron_papo.config import RunConfig
from megatron_papo.distributed.accelerator import allocator_in_words, wait_for_device
from megatron_papo.observe.profiling import MeasuredMemory, named_range
from megatron_papo.runtime.out_of_memory import told
from megatron_papo.runtime.watchdog import Watchdog

_GIB = 2**30
PLAIN_EVERY_S = 10.0
"""Where the output is no terminal, a long stage prints a line this often."""


class StageProgress:
    """How much of a stage is done; `StageClock.stage` returns it."""

    def __init__(self, clock: StageClock, path: str, name: str, total: int | None):
        self.path = path
        """Under which it is counted: its name behind those of the stages around it."""
        self._clock, self._name, self._total = clock, name, total
        self._done, self._start = 0, time.monotonic()
        self._next_line = self._start + PLAIN_EVERY_S
        self._task = clock._bar.add_task(name, total=total) if clock._bar else None

    def advance(self, count: int = 1) -> None:
        self._done += count
        self._clock._watchdog.moved()
        if self._clock._bar and self._task is not None:
            self._clock._bar.advance(self._task, count)
        elif self._clock._plain and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + PLAIN_EVERY_S
            of = f"/{self._total}" if self._total else ""
            print(f"  {self._name} {self._done}{of} ({time.monotonic() - self._start:.0f} s)", flush=True)

    def reach(self, done: int, total: int) -> None:
        """Progress so far, from work that counts by itself."""
        self._total = total
        if self._clock._bar and self._task is not None:
            self._clock._bar.update(self._task, total=total)
        self.advance(done - self._done)

    def _finish(self) -> float:
        if self._clock._bar and self._task is not None:
            self._clock._bar.remove_task(self._task)
        return time.monotonic() - self._start


class StageClock:
    """One a rank. `with clock.stage("generate", total=64) as progress: ... progress.advance()`; stages may nest: one
    within another counts as `outer/inner`, beside the outer one that it is part of.

    As a context it runs the watchdog from its beginning to its end, and then ends the display.
    """

    def __init__(self, run: RunConfig, rank: int, console: bool = True):
        """`console`: show progress; only rank 0 ever does."""
        self._watchdog = Watchdog(run, rank)
        self._memory = MeasuredMemory()
        self._seconds: dict[str, float] = defaultdict(float)
        self._innermost: list[StageProgress] = []
        shown = console and rank == 0
        screen = Console()
        self._plain = shown and not screen.is_terminal
        self._bar = _progress_bar(screen) if shown and screen.is_terminal else None

    def __enter__(self) -> Self:
        self._watchdog.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._watchdog.__exit__()
        if self._bar:
            self._bar.stop()

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[StageProgress]:
        """Times the block under `name` and shows it.

        A stage ends when the GPU has done its work: a GPU runs behind the host, and the end of an update, Adam above
        all, would count for the next stage. What waiting costs is the head start that the host has at that moment: the
        next stage's first kernels come some 10 us after the last ones, a few times in a step of seconds.
        """
        self._enter(name)
        path = f"{self._innermost[-1].path}/{name}" if self._innermost else name
        progress = StageProgress(self, path, name, total)
        self._innermost.append(progress)
        try:
            with named_range(name), self._memory.measured(path):
                yield progress
                wait_for_device()
        except Exception as error:
            if (failure := told(error, path, allocator_in_words)) is None:
                raise
            raise failure from error
        finally:
            self._innermost.pop()
            self._seconds[path] += progress._finish()
            self._leave()

    def report(self, done: int, total: int) -> None:
        """Progress of the stage that is running, for work that does not know of stages."""
        if self._innermost:
            self._innermost[-1].reach(done, total)

    def running(self) -> str:
        """The innermost stage at this moment; empty between stages."""
        return self._watchdog.running()

    def take(self) -> dict[str, float]:
        """Seconds of each stage since the last call, as `time/<stage>`, and its peak in GiB, as
        `memory_gib/<stage>`.

        Only the outermost, those without a slash in their name, add up: the seconds of the others are part of theirs.
        """
        taken = {f"time/{name}": seconds for name, seconds in self._seconds.items()}
        self._seconds.clear()
        return taken | {f"memory_gib/{name}": peak / _GIB for name, peak in self._memory.take().items()}

    def _enter(self, name: str) -> None:
        self._watchdog.enter(name)
        if self._bar and not self._innermost:
            self._bar.start()

    def _leave(self) -> None:
        self._watchdog.leave()
        if self._bar and not self._innermost:
            self._bar.stop()


def _progress_bar(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description:<16}"),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
