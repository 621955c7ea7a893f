"""Times every stage of a step, and its memory; shows its progress; ends a run that stalls, with every rank's stack.

A stage that makes no progress for longer than the limit writes the stacks of all threads to stderr and to
RUN/stacks/rank_N.txt and ends the process; the launcher then ends the other ranks, whose SIGTERM writes their stacks to
their own files. Progress is what the stage reports, and every stage that begins or ends within it. Leaves out stalls
outside any stage: those run into the timeout of the collective (`parallel.timeout_s`).
"""

from __future__ import annotations

import faulthandler
import math
import os
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from megatron_papo.config import RunConfig
from megatron_papo.observe.failures import Failure, leave_note, tell_torchrun

STALL_EXIT = 124
"""Exit code of a rank that the watchdog ended."""

_PLAIN_EVERY_S = 10.0
"""Where the output is no terminal, a long stage prints a line this often."""
_BACKUP_S = 10.0
"""The watchdog is a Python thread; when the interpreter itself is blocked, a C thread steps in this much later."""
_REARM_S = 1.0
"""Progress moves the C thread's time at most this often: it costs a thread each time."""
_PEERS_S = 4.0
"""Beyond a heartbeat, how long the others have to write where they are: once this rank is gone, collectives fail."""

_stack_files: dict[Path, TextIO] = {}


def stack_file(run_dir: Path, rank: int) -> TextIO:
    """RUN/stacks/rank_N.txt, emptied when this process first asks for it, and kept open."""
    path = run_dir / "stacks" / f"rank_{rank}.txt"
    if path not in _stack_files:
        path.parent.mkdir(parents=True, exist_ok=True)
        _stack_files[path] = path.open("w")
    return _stack_files[path]


def dump_stacks_on_sigterm(run_dir: Path, rank: int) -> None:
    """From now on SIGTERM writes this process's stacks to its stack file, then ends it.

    Done in C: works also while the interpreter waits inside a collective.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    faulthandler.register(signal.SIGTERM, file=stack_file(run_dir, rank), all_threads=True, chain=True)


def drop_empty_stack_file(run_dir: Path, rank: int) -> None:
    """At the end of a rank: away with the file that nothing was written to, and with a folder of none."""
    faulthandler.unregister(signal.SIGTERM)
    file = _stack_files.pop(run_dir / "stacks" / f"rank_{rank}.txt", None)
    if file is None:
        return
    file.close()
    path = Path(file.name)
    with suppress(OSError):  # another rank still has a file in the folder, or has removed it
        if path.stat().st_size == 0:
            path.unlink()
        path.parent.rmdir()


class StageProgress:
    """Handed out by `StageClock.stage`: how much of the stage is done."""

    def __init__(self, clock: StageClock, name: str, total: int | None):
        self._clock, self._name, self._total = clock, name, total
        self._done, self._start = 0, time.monotonic()
        self._next_line = self._start + _PLAIN_EVERY_S
        self._task = clock._bar.add_task(name, total=total) if clock._bar else None

    def advance(self, count: int = 1) -> None:
        self._done += count
        self._clock._moved()
        if self._clock._bar and self._task is not None:
            self._clock._bar.advance(self._task, count)
        elif self._clock._plain and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _PLAIN_EVERY_S
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
    """One a rank. `with clock.stage("generate", total=64) as progress: ... progress.advance()`; stages may nest.

    As a context manager it ends the display, whatever happens inside.
    """

    def __init__(self, run: RunConfig, rank: int, console: bool = True):
        """`console`: show progress; only rank 0 ever does."""
        self._limits, self._run_dir, self._rank = run, run.dir, rank
        # these import torch, which the launcher, who wants the stacks alone, does not wait for
        from megatron_papo.accelerator import wait_for_device
        from megatron_papo.observe.profiling import StageMemory, named_range

        self._memory, self._named_range, self._wait_for_device = StageMemory(), named_range, wait_for_device
        self._seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._innermost: list[StageProgress] = []
        self._deadline, self._rearm_at = math.inf, -math.inf
        self._ended = threading.Event()
        shown = console and rank == 0
        screen = Console()
        self._plain = shown and not screen.is_terminal
        self._bar = _progress_bar(screen) if shown and screen.is_terminal else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[StageProgress]:
        """Times the block under `name`, shows it, and ends the process when it stands still longer than the limit.

        A stage ends when the GPU has done its work: a GPU runs behind the host, and the end of an update, Adam above
        all, would count for the next stage. What waiting costs is the head start that the host has at that moment: the
        next stage's first kernels come some 10 us after the last ones, a few times in a step of seconds.
        """
        self._enter(name)
        progress = StageProgress(self, name, total)
        self._innermost.append(progress)
        try:
            with self._named_range(name), self._memory.measured(name):
                yield progress
                self._wait_for_device()
        finally:
            self._innermost.pop()
            self._seconds[name] += progress._finish()
            self._leave()

    def report(self, done: int, total: int) -> None:
        """Progress of the stage that is running, for work that does not know of stages."""
        if self._innermost:
            self._innermost[-1].reach(done, total)

    def running(self) -> str:
        """The innermost stage at this moment; empty between stages."""
        return next(iter(self._open[-1:]), "")

    def take(self) -> dict[str, float]:
        """Seconds of each stage since the last call, as `time/<stage>`, and its peak in bytes, as `memory/<stage>`."""
        taken = {f"time/{name}": seconds for name, seconds in self._seconds.items()}
        self._seconds.clear()
        return taken | {f"memory/{name}": float(peak) for name, peak in self._memory.take().items()}

    def _enter(self, name: str) -> None:
        self._open.append(name)
        self._moved()
        if len(self._open) == 1:
            self._ended = threading.Event()
            threading.Thread(target=self._watch, args=(self._ended,), daemon=True).start()
            if self._bar:
                self._bar.start()

    def _leave(self) -> None:
        self._open.pop()
        if self._open:
            self._moved()
        else:
            self._ended.set()
            self._rearm_at = -math.inf
            faulthandler.cancel_dump_traceback_later()
            if self._bar:
                self._bar.stop()

    def _moved(self) -> None:
        """Both watchdogs wait anew from now on."""
        if not self._open:
            return
        now, limit = time.monotonic(), self._limit()[1]
        self._deadline = now + limit
        if now >= self._rearm_at:
            self._rearm_at = now + _REARM_S
            file = stack_file(self._run_dir, self._rank)
            faulthandler.dump_traceback_later(limit + _BACKUP_S, file=file, exit=True)

    def _limit(self) -> tuple[str, float]:
        """The limit that holds, and the setting it comes from: the innermost open stage that has one of its own."""
        for name in reversed(self._open):
            if name in self._limits.stage_limits_s:
                return f"run.stage_limits_s.{name}", self._limits.stage_limits_s[name]
        return "run.stall_limit_s", self._limits.stall_limit_s

    def _watch(self, ended: threading.Event) -> None:
        while not ended.wait(max(0.0, self._deadline - time.monotonic())):
            for name in self._open[-1:]:  # none when the last stage ends at this moment
                if time.monotonic() >= self._deadline:
                    self._stalled(name)

    def _stalled(self, name: str) -> None:
        key, limit = self._limit()
        reason = f"stage {name} made no progress for {key}={limit:g}"
        text = reason
        with suppress(OSError):  # of a full disk
            file = stack_file(self._run_dir, self._rank)
            print(reason, file=file, flush=True)
            faulthandler.dump_traceback(file=file, all_threads=True)
            text = Path(file.name).read_text()
        # one write, so that the ranks' stacks do not mix on a shared terminal
        os.write(sys.__stderr__.fileno(), f"papo: rank {self._rank}: {text}\n".encode())  # type: ignore[union-attr]
        note = Failure(self._rank, time.time(), "stalled", "stalled", reason)
        tell_torchrun(note.reason())
        leave_note(self._run_dir, note)
        if any((self._run_dir / "heartbeats").glob("rank_*.json")):
            time.sleep(self._limits.heartbeat_s + _PEERS_S)
        os._exit(STALL_EXIT)


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
