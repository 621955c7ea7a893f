"""A sign of life of every rank, and an ear for the others: no rank waits for one that has failed.

A thread writes RUN/heartbeats/rank_N.json every `run.heartbeat_s`: host, process, stage and a count. Whoever watches
(the supervisor of a cluster job) compares the count with what it was, so that clocks need not agree. The same thread
looks for the note that a failing rank leaves in RUN/failures. On a note of a stall it writes this rank's stacks; on
any note it ends this process, which may well wait in a collective for the rank that is gone. Files on the disk that all
nodes share are what works under srun, torchrun and by hand alike. What lay there when this rank began is another
attempt's, and so is a note that says so (failure_notes.py).
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from megatron_papo.config import RunConfig
from megatron_papo.runtime.failure_notes import belong_to, is_ours, own_attempt, read_note
from megatron_papo.runtime.failures import Failure
from megatron_papo.runtime.run_lock import touch
from megatron_papo.runtime.stacks import stack_file
from megatron_papo.text.untrusted import LINES, as_text

PEER_EXIT = 3
"""Exit code of a rank that ended because another one had failed."""
_CAUSE_WAIT_S = 2.0
"""From a note to the end of this rank: one that fails for the same cause leaves its own note in the meantime."""
_LAST_BEAT_S = 5.0
"""That a clean end waits for a beat under way, on a disk that may not answer."""
_MISSED_BEATS = 3
"""So many beats behind the others, a rank is silent."""


class Heartbeat:
    """As a context: beats from its beginning to its end; a clean end takes the file away."""

    def __init__(self, run: RunConfig, rank: int, stage: Callable[[], str]):
        """`stage`: names what the rank is doing at the moment."""
        self._run, self._rank, self._stage = run, rank, stage
        self._path = run.dir / "heartbeats" / f"rank_{rank}.json"
        self._count = 0
        self._said = False
        self._earlier: set[tuple[str, int, int]] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._earlier = set(self._notes().values())
        self._beat()
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self._ended.set()
        if error is None:
            self._thread.join(_LAST_BEAT_S)  # a beat under way would bring the file back
            with suppress(OSError):
                self._path.unlink()
                self._path.parent.rmdir()  # fails as long as another rank's is there

    def met(self, attempt: str) -> None:
        """From now on signs and notes of this rank are of `attempt`, as those of all its ranks, which have met."""
        belong_to(attempt)
        self._beat()

    def _watch(self) -> None:
        while not self._ended.wait(self._run.heartbeat_s):
            try:
                self._beat()
                note = self._failed_peer()
            except Exception as error:  # whatever lies there: without this thread the rank would be taken for dead
                self._say_once(error)
                continue
            if note and not self._ended.wait(_CAUSE_WAIT_S):
                self._end(note)

    def _beat(self) -> None:
        """A full disk or one that does not answer is no reason to end: the supervisor decides."""
        self._count += 1
        sign = {"count": self._count, "host": socket.gethostname(), "pid": os.getpid(), "stage": self._stage()}
        sign["attempt"] = own_attempt()
        draft = self._path.with_suffix(".tmp")
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            draft.write_text(json.dumps(sign))
            draft.rename(self._path)
        if self._rank == 0:
            touch(self._run.dir)

    def _failed_peer(self) -> Failure | None:
        for path, place in self._notes().items():
            note = read_note(path) if place not in self._earlier else None
            if note is not None and note.rank != self._rank and is_ours(note):
                return note
        return None

    def _notes(self) -> dict[Path, tuple[str, int, int]]:
        """The files there are, and what tells each from one that takes its place; without a look at any clock."""
        states = {}
        with suppress(OSError):
            for path in sorted((self._run.dir / "failures").glob("rank_*.json")):
                with suppress(OSError):
                    state = path.stat()
                    states[path] = (path.name, state.st_ino, state.st_mtime_ns)
        return states

    def _say_once(self, error: Exception) -> None:
        if not self._said:
            self._said = True
            text = f"papo: warning: rank {self._rank}: looking for failures: {type(error).__name__}: {error}"
            print(text, file=sys.stderr, flush=True)

    def _end(self, note: Failure) -> None:
        with suppress(Exception):
            why = as_text(note.reason().removeprefix("papo: "), LINES)
            print(f"papo: rank {self._rank} ends, since {why}", file=sys.stderr, flush=True)
        with suppress(OSError):
            if note.kind in ("stalled", "killed"):  # the latter of one that is silent, while others stall
                file, how = stack_file(self._run.dir, self._rank), "stalled" if note.kind == "stalled" else "was silent"
                print(f"while rank {note.rank} {how}: {note.message}", file=file, flush=True)
                faulthandler.dump_traceback(file=file, all_threads=True)
        os._exit(PEER_EXIT)


def silent_rank(run: RunConfig) -> Failure | None:
    """The one that has been silent for longest while others were not, by the clock of the disk that they all write to;
    None when all have been heard of lately. A rank that ended well has no sign, and one that never began has none."""
    signs = _signs(run.dir / "heartbeats")
    first = min(signs, key=lambda rank: signs[rank][0], default=None)
    if first is None:
        return None
    (written, sign), newest = signs[first], max(written for written, _ in signs.values())
    if newest - written <= _MISSED_BEATS * run.heartbeat_s:
        return None
    stage = f"in stage {sign['stage']}" if sign.get("stage") else "between stages"
    text = f"no sign of life from {sign.get('host')} for {newest - written:.0f} s ({stage})"
    return Failure(first, time.time(), "killed", "dead", text)


def _signs(folder: Path) -> dict[int, tuple[float, dict[str, Any]]]:
    """By rank: when it was written and what it says; those of this attempt."""
    signs = {}
    for path in folder.glob("rank_*.json"):
        with suppress(OSError, ValueError):
            written, sign = path.stat().st_mtime, json.loads(path.read_text())
            if isinstance(sign, dict) and sign.get("attempt") == own_attempt():
                signs[int(path.stem.removeprefix("rank_"))] = (written, sign)
    return signs
