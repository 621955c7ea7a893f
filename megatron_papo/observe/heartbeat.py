"""A sign of life of every rank, and an ear for the others: no rank waits for one that has failed.

A thread writes RUN/heartbeats/rank_N.json every `run.heartbeat_s`: host, process, stage and a count. Whoever watches
(the supervisor of a cluster job) compares the count with what it was, so that clocks need not agree. The same thread
looks for the note that a failing rank leaves in RUN/failures. On a note of a stall it writes this rank's stacks; on
any note it ends this process, which may well wait in a collective for the rank that is gone. Files on the disk that all
nodes share are what works under srun, torchrun and by hand alike. Notes older than this rank's first sign of life
are another attempt's.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Self

from megatron_papo.config import RunConfig
from megatron_papo.observe.failures import Failure, read_failures
from megatron_papo.observe.watchdog import stack_file
from megatron_papo.text import LINES, as_text

PEER_EXIT = 3
"""Exit code of a rank that ended because another one had failed."""
_CAUSE_WAIT_S = 2.0
"""From a note to the end of this rank: one that fails for the same cause leaves its own note in the meantime."""
_LAST_BEAT_S = 5.0
"""That a clean end waits for a beat under way, on a disk that may not answer."""


class Heartbeat:
    """As a context: beats from its beginning to its end; a clean end takes the file away."""

    def __init__(self, run: RunConfig, rank: int, stage: Callable[[], str]):
        """`stage`: names what the rank is doing at the moment."""
        self._run, self._rank, self._stage = run, rank, stage
        self._path = run.dir / "heartbeats" / f"rank_{rank}.json"
        self._count = 0
        self._first_time = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._beat()
        with suppress(OSError):
            self._first_time = self._path.stat().st_mtime  # of the shared disk's clock, as the notes are
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self._ended.set()
        if error is None:
            self._thread.join(_LAST_BEAT_S)  # a beat under way would bring the file back
            with suppress(OSError):
                self._path.unlink()
                self._path.parent.rmdir()  # fails as long as another rank's is there

    def _watch(self) -> None:
        while not self._ended.wait(self._run.heartbeat_s):
            self._beat()
            note = self._failed_peer()
            if note and not self._ended.wait(_CAUSE_WAIT_S):
                self._end(note)

    def _beat(self) -> None:
        """A full disk or one that does not answer is no reason to end: the supervisor decides."""
        self._count += 1
        sign = {"count": self._count, "host": socket.gethostname(), "pid": os.getpid(), "stage": self._stage()}
        draft = self._path.with_suffix(".tmp")
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            draft.write_text(json.dumps(sign))
            draft.rename(self._path)

    def _failed_peer(self) -> Failure | None:
        with suppress(OSError, ValueError):
            for rank, note in read_failures(self._run.dir / "failures").items():
                written = (self._run.dir / "failures" / f"rank_{rank}.json").stat().st_mtime
                if rank != self._rank and written >= self._first_time:
                    return note
        return None

    def _end(self, note: Failure) -> None:
        why = as_text(note.reason().removeprefix("papo: "), LINES)
        print(f"papo: rank {self._rank} ends, since {why}", file=sys.stderr, flush=True)
        if note.kind == "stalled":
            file = stack_file(self._run.dir, self._rank)
            print(f"while rank {note.rank} stalled: {note.message}", file=file, flush=True)
            faulthandler.dump_traceback(file=file, all_threads=True)
        os._exit(PEER_EXIT)
