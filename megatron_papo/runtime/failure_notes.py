"""Notes of failures: how a failing rank tells the other ranks, the launcher and torchrun why it ends.

RUN/failures/rank_N.json is what the ranks of all nodes and the supervisor of a cluster job read. The folder may hold
notes of earlier attempts, those of other versions too, and files that are no notes: only a complete note counts, and
each says to which attempt it belongs. The launcher of local ranks has a file in memory, which ranks append to: it needs
no folder and no space on a disk, and ends with the processes. Imports the standard library only, as `failures.py` does.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
import typing
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, fields, replace
from multiprocessing import reduction
from pathlib import Path
from typing import Any

from megatron_papo.runtime.failures import Failure, Kind

_TORCHRUN_FILE = "TORCHELASTIC_ERROR_FILE"
"""Where torchrun tells each rank to leave its reason, for the report that it ends with."""
_KINDS = typing.get_args(Kind)

_attempt = ""
_launchers_notes: NotesInMemory | None = None


def belong_to(attempt: str) -> None:
    """From now on this process's notes belong to `attempt`, a name that only the attempt's ranks know."""
    global _attempt
    _attempt = attempt


def own_attempt() -> str:
    """The name of this process's attempt; empty before its ranks have met."""
    return _attempt


def is_ours(failure: Failure) -> bool:
    """Whether `failure` may belong to this process's attempt. A note from before the ranks met names no attempt, and so
    it may."""
    return not (_attempt and failure.attempt) or failure.attempt == _attempt


def report_to(launchers_notes: NotesInMemory) -> None:
    """From now on this process reports its failure to a launcher too."""
    global _launchers_notes
    _launchers_notes = launchers_notes


def announce(run_dir: Path, failure: Failure) -> None:
    """Tells the launcher, torchrun and the other ranks of `failure`; never fails itself."""
    tell_launcher(failure)
    tell_torchrun(failure.reason())
    leave_note(run_dir, failure)


def leave_note(run_dir: Path, failure: Failure) -> None:
    """Writes the note to RUN/failures, where the ranks of all nodes look for it. A note that cannot be written is left
    out."""
    with suppress(OSError):
        (run_dir / "failures").mkdir(parents=True, exist_ok=True)
        write_failure(run_dir / "failures", replace(failure, attempt=_attempt))


def write_failure(folder: Path, failure: Failure) -> None:
    """Writes the note as one file, which is complete or absent, also when several processes write about one rank."""
    draft = folder / f"rank_{failure.rank}.{os.uname().nodename}.{os.getpid()}.tmp"
    draft.write_bytes(_line(failure))
    draft.rename(folder / f"rank_{failure.rank}.json")


def read_failures(folder: Path) -> dict[int, Failure]:
    """The notes in `folder`, by rank."""
    notes = (read_note(path) for path in sorted(folder.glob("rank_*.json")))
    return {note.rank: note for note in notes if note is not None}


def read_note(path: Path) -> Failure | None:
    """The note in the file `path`; None if it is no note or no longer exists."""
    try:
        return _parsed(path.read_bytes())
    except OSError:
        return None


class NotesInMemory:
    """A file without a name, for a launcher and the ranks that it forks or spawns; freed with the last of them."""

    def __init__(self, descriptor: int | None = None):
        """Makes a new file, or uses the open file `descriptor`."""
        self._descriptor = os.memfd_create("notes") if descriptor is None else descriptor
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, os.O_APPEND)

    def __reduce__(self) -> tuple[Callable[..., NotesInMemory], tuple[Any]]:
        return _passed_on, (reduction.DupFd(self._descriptor),)

    def append(self, failure: Failure) -> None:
        os.write(self._descriptor, _line(failure))

    def read(self) -> dict[int, Failure]:
        """What ranks have reported so far, by rank; a line that a killed rank began is left out."""
        lines = os.pread(self._descriptor, os.fstat(self._descriptor).st_size, 0).splitlines()
        notes = (_parsed(line) for line in lines)
        return {note.rank: note for note in notes if note is not None}

    def close(self) -> None:
        os.close(self._descriptor)


def _passed_on(duplicate: Any) -> NotesInMemory:
    return NotesInMemory(duplicate.detach())


def tell_launcher(failure: Failure) -> None:
    """Appends the note to the launcher's file in memory; does nothing in a rank without a launcher."""
    if _launchers_notes is not None:
        with suppress(OSError):
            _launchers_notes.append(failure)


def tell_torchrun(reason: str) -> None:
    """Lets torchrun's closing report name `reason`, which takes the earliest rank's as the root cause. Without torchrun
    it does nothing.

    In the format of torch.distributed.elastic's error handler, without a call stack: the report would show it instead.
    """
    path = os.environ.get(_TORCHRUN_FILE)
    if path:
        note = {"message": reason, "extraInfo": {"timestamp": str(int(time.time()))}}
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": note}))


def _line(failure: Failure) -> bytes:
    return json.dumps(asdict(failure)).encode() + b"\n"


def _parsed(text: bytes) -> Failure | None:
    try:
        record = json.loads(text)
        note = Failure(**{each.name: record[each.name] for each in fields(Failure) if each.name in record})
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    words = (note.name, note.message, note.traceback, note.attempt)
    numbers = isinstance(note.rank, int) and isinstance(note.time, (int, float))
    return note if numbers and note.kind in _KINDS and all(isinstance(word, str) for word in words) else None
