"""Why a rank ended: each failing rank says so, and the run reports the failure that explains the others.

When a rank dies, its connections to the other ranks break, so most ranks of a failed run fail for a reason that is not
their own. Such errors are recognised by type and wording. Where the wording is unknown the earliest note counts: the
rank that caused the trouble has always written first. A ValueError, by this project's convention, is what a user can
put right: its traceback goes to a file, and the console shows the reason only. Leaves out how the other ranks learn of
a failure (failure_notes.py) and what the operating system knows (signals, exit codes), which the launcher reads.
"""

from __future__ import annotations

import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_papo.text.secret_values import text_without_secrets
from megatron_papo.text.untrusted import LINES, as_text

Kind = Literal["error", "value", "config", "stopped", "killed", "stalled", "distributed", "silent"]

SAVED_EXIT = 85
"""Exit code of a run that was asked to end (SIGUSR1), saved and is to go on later."""

SAVED_FILE = "saved"
"""A file under RUN that says the same. A rank that srun started exits with 0 instead: srun would take SAVED_EXIT of one
rank for a failure and end the others."""

_ORDER: tuple[tuple[Kind, ...], ...] = (
    ("config", "stopped", "value", "error"), ("killed",), ("stalled",), ("distributed",), ("silent",),
)  # fmt: skip
"""Which kind of failure explains the end of a run: kinds of the first row before those of the next, and within a row
the earliest failure."""

_PEER_TYPES = ("DistError", "DistBackendError", "DistNetworkError", "DistStoreError", "DistQueueEmptyError")
_PEER_WORDS = ("closed by peer", "reset by peer", "gloo/transport", "nccl error", "nccl communicator", "broken pipe")
_PEER_TIMEOUTS = ("timed out waiting", "watchdog caught collective", "connection timed out", "wait timeout")


@dataclass(frozen=True)
class Failure:
    """Why a rank ended, as its note says it."""

    rank: int
    time: float
    """When it failed, in seconds of Unix time."""
    kind: Kind
    name: str
    """Class of the exception, or what stands in its place."""
    message: str
    traceback: str = ""
    attempt: str = ""
    """Name of the attempt of the run; empty before its ranks have met (failure_notes.py)."""

    def reason(self) -> str:
        """The line that the run ends with."""
        return f"papo: rank {self.rank} failed: {self.name}: {self.message}"

    @property
    def exit_code(self) -> int:
        """2 for refused settings, as when the command line refuses them itself; else 1."""
        return 2 if self.kind == "config" else 1


class RunStopped(ValueError):
    """A guard that the user has set ended the run. A supervisor does not start such a run again."""


class AskedToStop(RunStopped):
    """The run was asked to stop, by Ctrl-C or before its time limit, and its settings let nothing be saved."""


def is_peers_fault(error: BaseException) -> bool:
    """True for what torch.distributed raises when another rank is gone or does not answer."""
    text = str(error).lower()
    named = any(base.__name__ in _PEER_TYPES for base in type(error).__mro__)
    return named or any(words in text for words in _PEER_WORDS + _PEER_TIMEOUTS)


def describe(rank: int, error: BaseException) -> Failure:
    """The failure that `error`, which ended `rank`, stands for: its kind, message and traceback, without secrets."""
    kind: Kind = "error"
    if any(base.__name__ == "ConfigError" for base in type(error).__mro__):
        kind = "config"
    elif is_peers_fault(error):
        kind = "distributed"
    elif isinstance(error, RunStopped):
        kind = "stopped"
    elif isinstance(error, ValueError):
        kind = "value"
    message, text = map(text_without_secrets, (str(error), "".join(traceback.format_exception(error))))
    return Failure(rank, time.time(), kind, type(error).__name__, message, text)


def the_cause(failures: list[Failure]) -> Failure:
    """The one of all ranks' failures that explains the others. `failures` is not empty."""
    assert failures, "a run that failed has a failure"
    for kinds in _ORDER:
        candidates = [failure for failure in failures if failure.kind in kinds]
        if candidates:
            return min(candidates, key=lambda failure: failure.time)
    raise AssertionError("every kind stands in _ORDER")


def print_failure(failure: Failure, run_dir: Path) -> None:
    """Writes the failure to stderr; the last line is its reason.

    Before it comes the traceback or, for a ValueError, the name of the file under `run_dir` that holds the traceback.
    Refused settings have no traceback, and a line for each fault.
    """
    if failure.kind == "config":
        text = "\n".join(f"papo: error: {line}" for line in failure.message.splitlines())
    elif failure.kind in ("value", "stopped"):
        text = _save_traceback(failure, run_dir) + failure.reason()
    else:
        text = failure.traceback + failure.reason()
    print(as_text(text, LINES), file=sys.stderr, flush=True)


def _save_traceback(failure: Failure, run_dir: Path) -> str:
    """Writes the traceback to a file. Returns the line that names it, or the traceback if it cannot be written."""
    path = run_dir / "failures" / f"rank_{failure.rank}.txt"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(failure.traceback, "utf-8", "backslashreplace")
    except OSError:
        return failure.traceback
    return f"papo: the traceback is in {path}\n"
