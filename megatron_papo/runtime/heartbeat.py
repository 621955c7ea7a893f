"""Every rank writes signs of life and looks for failures of the others, so that no rank waits for one that has failed.

A thread writes RUN/heartbeats/rank_N.json every `run.heartbeat_s`: host, process, stage and a count. The supervisor of
a cluster job compares the count with what it was before, so that clocks need not agree. The same thread looks for the
note that a failing rank leaves in RUN/failures. After a note of a stall it writes this rank's stacks; after any note it
ends this process, which may be waiting in a collective for the rank that is gone. Files on the disk that all nodes
share work the same under srun, under torchrun and by hand. Notes that were there when this rank began belong to an
earlier attempt, and so do notes that name another one (failure_notes.py).
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
"""Seconds from a note to the end of this rank, in which a rank that fails for the same cause leaves its own note."""
_LAST_BEAT_S = 5.0
"""Seconds that a clean end waits for a sign that is being written, since the disk may not answer."""
_MISSED_BEATS = 3
"""A rank is silent when its last sign is so many intervals older than the newest one."""


class Heartbeat:
    """A context in which this rank gives signs of life and looks for failures; a clean end removes its file."""

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
            self._thread.join(_LAST_BEAT_S)  # a sign that is being written would make the file again
            with suppress(OSError):
                self._path.unlink()
                self._path.parent.rmdir()  # fails as long as another rank's is there

    def met(self, attempt: str) -> None:
        """From now on signs and notes of this rank belong to `attempt`, the name that all ranks know since they met."""
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
        """Writes a sign of life. A disk that is full or does not answer is ignored: the supervisor decides."""
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
        """The notes that exist, each with what distinguishes it from a file that replaces it; needs no clock."""
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
            if note.kind in ("stalled", "killed"):  # "killed": that rank is silent, and the others stall
                file, how = stack_file(self._run.dir, self._rank), "stalled" if note.kind == "stalled" else "was silent"
                print(f"while rank {note.rank} {how}: {note.message}", file=file, flush=True)
                faulthandler.dump_traceback(file=file, all_threads=True)
        os._exit(PEER_EXIT)


def silent_rank(run: RunConfig) -> Failure | None:
    """The failure of the rank whose last sign of life is oldest, if others were not silent meanwhile; else None. The
    clock is that of the disk which all write to. A rank that ended well, or that never began, has no sign."""
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
    """The signs of life of this attempt, by rank: when each was written, and what it says."""
    signs = {}
    for path in folder.glob("rank_*.json"):
        with suppress(OSError, ValueError):
            written, sign = path.stat().st_mtime, json.loads(path.read_text())
            if isinstance(sign, dict) and sign.get("attempt") == own_attempt():
                signs[int(path.stem.removeprefix("rank_"))] = (written, sign)
    return signs
