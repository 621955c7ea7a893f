"""Where a failing rank leaves word, for whoever looks: the other ranks, the launcher, torchrun.

RUN/failures/rank_N.json is what the ranks of all nodes and the supervisor of a cluster job read. The folder may hold
notes of earlier attempts, those of other versions too, and files that are no notes: nothing but a whole note counts,
and a note says which attempt it is of. The launcher of local ranks has a file in memory, which ranks append to: it
needs no folder and no room on a disk, and goes with the processes. Standard library alone, as `failures.py`.
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
    """From now on this process's notes are of `attempt`, which all its ranks know by this name and no other attempt."""
    global _attempt
    _attempt = attempt


def own_attempt() -> str:
    """Empty before its ranks have met."""
    return _attempt


def is_ours(failure: Failure) -> bool:
    """Whether it may be of this process's attempt: of one that failed before the ranks met nothing else is known."""
    return not (_attempt and failure.attempt) or failure.attempt == _attempt


def report_to(launchers_notes: NotesInMemory) -> None:
    """From now on this process reports its failure to a launcher too."""
    global _launchers_notes
    _launchers_notes = launchers_notes


def announce(run_dir: Path, failure: Failure) -> None:
    """To everybody who may listen; never fails."""
    tell_launcher(failure)
    tell_torchrun(failure.reason())
    leave_note(run_dir, failure)


def leave_note(run_dir: Path, failure: Failure) -> None:
    """The note where the ranks of all nodes look for it, RUN/failures; nothing where nothing can be written."""
    with suppress(OSError):
        (run_dir / "failures").mkdir(parents=True, exist_ok=True)
        write_failure(run_dir / "failures", replace(failure, attempt=_attempt))


def write_failure(folder: Path, failure: Failure) -> None:
    """The note as one file; complete or absent, never half, also when several ranks write of one."""
    draft = folder / f"rank_{failure.rank}.{os.uname().nodename}.{os.getpid()}.tmp"
    draft.write_bytes(_line(failure))
    draft.rename(folder / f"rank_{failure.rank}.json")


def read_failures(folder: Path) -> dict[int, Failure]:
    """The notes found in `folder`, by rank."""
    notes = (read_note(path) for path in sorted(folder.glob("rank_*.json")))
    return {note.rank: note for note in notes if note is not None}


def read_note(path: Path) -> Failure | None:
    """None for what is no note, or gone by now."""
    try:
        return _parsed(path.read_bytes())
    except OSError:
        return None


class NotesInMemory:
    """A file without a name, for a launcher and the ranks that it forks or spawns; it goes with the last of them."""

    def __init__(self, descriptor: int | None = None):
        """A new one, or that of an open file."""
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
    """Nothing without one."""
    if _launchers_notes is not None:
        with suppress(OSError):
            _launchers_notes.append(failure)


def tell_torchrun(reason: str) -> None:
    """Lets torchrun's closing report name `reason`; without torchrun, nothing. The earliest rank's is its root cause.

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
