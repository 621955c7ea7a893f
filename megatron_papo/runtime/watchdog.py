"""Ends a run that makes no progress, with the stacks of every rank; active from the beginning of a verb to its end.

A thread of every rank looks whether a stage has begun, reported progress or ended. When none has for longer than the
limit of the stage, or `run.stall_limit_s` between stages, it writes the stacks of all threads to stderr and to
RUN/stacks/rank_N.txt, says why, and ends the process; the other ranks then end too, with their stacks (heartbeat.py,
launch.py). If a rank gives no sign of life any more, it is named as the cause: the others only wait for it. Time for
which this process was stopped does not count. Ranks of separate engines have no watchdog, since waiting is their work.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from contextlib import suppress
from pathlib import Path

from megatron_papo.config import RunConfig
from megatron_papo.runtime.awake_clock import AwakeClock
from megatron_papo.runtime.failure_notes import announce
from megatron_papo.runtime.failures import Failure
from megatron_papo.runtime.heartbeat import silent_rank
from megatron_papo.runtime.stacks import stack_file

STALL_EXIT = 124
"""Exit code of a rank that the watchdog ended."""

_LOOK_S = 1.0
_BACKUP = 2.0
"""The watchdog is a Python thread; when the interpreter itself is blocked, a C thread steps in after this many times
the limit. It cannot tell that the process was stopped, so it leaves time for that: as long as the limit."""
_LAST_WORDS_S = 20.0
"""Seconds that a rank may take to report that it has stalled, since the disk may not answer."""
_PEERS_S = 4.0
"""Seconds, beside `run.heartbeat_s`, that the other ranks have to write their stacks: once this rank has ended, their
collectives fail."""


class Watchdog:
    """A context in which a thread watches this rank. `moved`, `enter` and `leave` cost almost nothing."""

    def __init__(self, run: RunConfig, rank: int):
        self._run, self._rank = run, rank
        self._look_s = min(_LOOK_S, *(limit / 4 for limit in (run.stall_limit_s, *run.stage_limits_s.values())))
        self._open: list[str] = []
        self._last = ""
        self._moves = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def enter(self, stage: str) -> None:
        self._open.append(stage)
        self._moves += 1

    def leave(self) -> None:
        self._last = self._open.pop()
        self._moves += 1

    def moved(self) -> None:
        self._moves += 1

    def running(self) -> str:
        """The innermost stage at this moment; empty between stages."""
        return next(iter(self._open[-1:]), "")

    def _watch(self) -> None:
        clock, moves, since = AwakeClock(2 * self._look_s), -1, 0.0
        while not self._ended.wait(self._look_s):
            now, (key, limit) = clock.seconds(), self._limit()
            if moves != self._moves:
                moves, since = self._moves, now
            if now - since >= limit:
                self._end_after(self._run.heartbeat_s + _PEERS_S + _LAST_WORDS_S)
                self._stalled(f"{self._place()} made no progress for {key}={limit:g}")
            self._end_after(_BACKUP * limit - (now - since))

    def _end_after(self, seconds: float) -> None:
        """The C thread ends the process after `seconds`; there is none if no file for stacks can be opened."""
        with suppress(OSError, ValueError):
            file = stack_file(self._run.dir, self._rank)
            faulthandler.dump_traceback_later(seconds, file=file, exit=True)

    def _limit(self) -> tuple[str, float]:
        """The limit that holds, and the setting it comes from: the innermost open stage that has one of its own."""
        for name in reversed(self._open):
            if name in self._run.stage_limits_s:
                return f"run.stage_limits_s.{name}", self._run.stage_limits_s[name]
        return "run.stall_limit_s", self._run.stall_limit_s

    def _place(self) -> str:
        stage = self.running()
        if stage:
            return f"stage {stage}"
        return f"the run, after stage {self._last}," if self._last else "the run, before its first stage,"

    def _stalled(self, reason: str) -> None:
        text = reason
        with suppress(OSError):  # of a full disk
            file = stack_file(self._run.dir, self._rank)
            print(reason, file=file, flush=True)
            faulthandler.dump_traceback(file=file, all_threads=True)
            text = Path(file.name).read_text(errors="replace")
        with suppress(OSError):  # one write, so that the ranks' stacks do not mix on a shared terminal
            os.write(2, f"papo: rank {self._rank}: {text}\n".encode())
        announce(self._run.dir, Failure(self._rank, time.time(), "stalled", "stalled", reason))
        if (silent := silent_rank(self._run)) is not None:
            announce(self._run.dir, silent)  # last, for torchrun keeps one reason a rank
        wait_s = 2 * self._look_s  # others stall for the same cause, and look at another moment
        with suppress(OSError):
            if any((self._run.dir / "heartbeats").glob("rank_*.json")):
                wait_s = self._run.heartbeat_s + _PEERS_S
        time.sleep(wait_s)
        os._exit(STALL_EXIT)
