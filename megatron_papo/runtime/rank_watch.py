"""Watches the ranks that this machine's launcher started, and says which of them ended badly, and why.

The first rank that ends badly ends the run. Other ranks get a moment to leave their notes, so that
the reason that is shown is that of the rank which failed first, and not of one that lost its connection to it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from megatron_papo.runtime.failure_notes import NotesInMemory, leave_note
from megatron_papo.runtime.failures import SAVED_EXIT, Failure, print_failure, the_cause
from megatron_papo.runtime.out_of_memory import kernel_kills, why_killed
from megatron_papo.runtime.rank_signals import stop
from megatron_papo.runtime.watchdog import STALL_EXIT
from megatron_papo.text.untrusted import LINES, as_text

_SETTLE_S = 1.5
"""Seconds after the first failure in which other ranks can leave their notes."""


def watch_ranks(ranks: list[BaseProcess], run_dir: Path, notes: NotesInMemory) -> int:
    """Waits until every rank has ended well, or one has ended badly, and returns the exit code of the run.

    Prints which rank ended badly and why, from the `notes` that ranks left; `run_dir` has the stacks of stalled ranks.
    """
    running, saved, kills = list(ranks), False, kernel_kills()
    while running:
        wait([process.sentinel for process in running])
        # read once: a rank's sentinel may fire before its exit code is there, and a second reading would see it
        exitcodes = [process.exitcode for process in running]
        saved = saved or SAVED_EXIT in exitcodes
        if any(code not in (None, 0, SAVED_EXIT) for code in exitcodes):
            failure = _explain(ranks, run_dir, notes, kills)
            stalled = failure.kind == "stalled" or STALL_EXIT in [process.exitcode for process in ranks]
            stop(ranks)
            if stalled:
                _print_stacks(ranks, run_dir)
            print_failure(failure, run_dir)
            if "SLURM_STEP_ID" in os.environ:  # the supervisor of a job with one task reads notes, not what is printed
                leave_note(run_dir, failure)
            return failure.exit_code
        running = [process for process, code in zip(running, exitcodes) if code is None]
    return SAVED_EXIT if saved else 0


def _explain(ranks: list[BaseProcess], run_dir: Path, reported: NotesInMemory, kills: int | None) -> Failure:
    deadline = time.monotonic() + _SETTLE_S
    while time.monotonic() < deadline and any(process.exitcode is None for process in ranks):
        wait([process.sentinel for process in ranks if process.exitcode is None], timeout=0.1)
    notes = reported.read()
    for rank, process in enumerate(ranks):
        if process.exitcode not in (None, 0, SAVED_EXIT) and rank not in notes:
            notes[rank] = _without_note(rank, process.exitcode, run_dir, kills)
    return the_cause(list(notes.values()))


def _without_note(rank: int, exitcode: int, run_dir: Path, kills: int | None) -> Failure:
    """The failure of a rank that ended without leaving a note, from its exit code; `kills`: the kernel's count of
    processes killed for want of memory when the ranks started."""
    if exitcode < 0:
        name = signal.Signals(-exitcode).name
        why = why_killed(kills) if name == "SIGKILL" else f"by signal {name}"
        return Failure(rank, time.time(), "killed", "killed", why)
    stacks = run_dir / "stacks" / f"rank_{rank}.txt"
    first_line = stacks.read_text(errors="replace").partition("\n")[0] if stacks.exists() else ""
    if first_line:
        return Failure(rank, stacks.stat().st_mtime, "stalled", "stalled", first_line)
    return Failure(rank, time.time(), "silent", "ended", f"with exit code {exitcode}")


def _print_stacks(ranks: list[BaseProcess], run_dir: Path) -> None:
    """Prints the stacks of ranks that the launcher ended; ranks that ended themselves have printed theirs."""
    for rank, process in enumerate(ranks):
        path = run_dir / "stacks" / f"rank_{rank}.txt"
        if process.exitcode != STALL_EXIT and path.exists():
            print(f"papo: rank {rank}: {as_text(path.read_text(errors='replace'), LINES)}", file=sys.stderr)
