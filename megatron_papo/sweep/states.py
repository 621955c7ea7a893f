"""How each point of a sweep stands: from its folder, from Slurm's queue, and from what was refused at submission.

A point that is done, or that failed, is so for good, whatever Slurm still remembers. One that was cancelled, preempted
or lost with its node is interrupted: the same command submits it again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_papo.cluster import run_records
from megatron_papo.cluster.attempts import Attempt, read_attempts
from megatron_papo.cluster.slurm import QueuedJob
from megatron_papo.files.small_files import read_object, write_atomically
from megatron_papo.runtime.failures import SAVED_EXIT, AskedToStop
from megatron_papo.runtime.progress import read_progress
from megatron_papo.sweep.points import Point, Sweep

Word = Literal["new", "refused", "pending", "running", "done", "failed", "interrupted"]
LIVING = ("pending", "running")
_NO_FAULT = frozenset(("BOOT_FAIL", "CANCELLED", "NODE_FAIL", "PREEMPTED"))
"""How Slurm ends jobs that did nothing wrong."""
_INTERRUPTED_EXITS = (SAVED_EXIT, 128 + 2, 128 + 15)


@dataclass(frozen=True)
class State:
    word: Word
    reason: str = ""
    """Why it waits, failed, was refused or interrupted."""


def states_of(sweep: Sweep, points: Sequence[Point], jobs: Sequence[QueuedJob]) -> dict[str, State]:
    """By the points' names. `jobs`: this user's, as squeue shows them; none without Slurm."""
    refused = read_refused(sweep)
    return {point.name: _state(point, jobs, sweep.steps, refused) for point in points}


def _state(point: Point, jobs: Sequence[QueuedJob], steps: int, refused: Mapping[str, str]) -> State:
    own = run_records.jobs_of(point.run_dir, jobs)
    living = [job for job in own if not job.is_over]
    if living:
        running = living[0].state not in ("PENDING", "REQUEUED")
        return State("running") if running else State("pending", living[0].reason.removesuffix("None"))
    folder = run_records.folder_of(point.run_dir)
    if (folder / "local.json").exists():
        return state_of_local_run(point.run_dir, steps)
    attempts = read_attempts(point.run_dir)
    if any(attempt.end == "done" for attempt in attempts) and read_progress(point.run_dir).steps_done >= steps:
        return State("done")
    submitted = run_records.submissions(point.run_dir)
    if point.name in refused:
        return State("refused", refused[point.name])
    if not submitted:
        return State("new")
    newest = submitted[-1].job
    ended = [job for job in own if job.id == newest]
    last = [attempt for attempt in attempts if attempt.job == newest]
    return _after_job(point.run_dir, newest, last, ended[0] if ended else None)


def _after_job(run_dir: Path, job: str, attempts: list[Attempt], ended: QueuedJob | None) -> State:
    """The state of a run that is not done and whose newest job is over, or that Slurm has forgotten (None)."""
    if attempts and attempts[-1].failure == AskedToStop.__name__:
        return State("interrupted", _reason(attempts[-1]))
    if attempts and attempts[-1].end in ("failed", "refused", "stopped"):
        return State("failed", _reason(attempts[-1]))
    if ended is not None and ended.state in _NO_FAULT:
        return State("interrupted", f"job {job}: {ended.state.lower().replace('_', ' ')}")
    said = "" if attempts else last_line(run_records.folder_of(run_dir) / f"job_{job}.log")
    if said or ended is not None:
        return State("failed", said or f"job {job}: {str(ended and ended.state).lower().replace('_', ' ')}")
    return State("interrupted", f"job {job}: Slurm does not know it any more")


def _reason(attempt: Attempt) -> str:
    return attempt.reason.removeprefix("papo: ").replace("\n", "; ")


def state_of_local_run(run_dir: Path, steps: int) -> State:
    try:
        code = read_object(run_records.folder_of(run_dir) / "local.json").get("exit_code")
    except ValueError as error:
        return State("interrupted", str(error))
    if not isinstance(code, int):
        return State("interrupted", f"{run_records.folder_of(run_dir) / 'local.json'}: names no exit code")
    if code == 0 and read_progress(run_dir).steps_done >= steps:
        return State("done")
    if code < 0 or code in _INTERRUPTED_EXITS:
        return State("interrupted", f"ended by signal or by hand, exit code {code}")
    return State("failed", last_line(run_records.folder_of(run_dir) / "local.log") or f"exit code {code}")


def last_line(log: Path) -> str:
    """The reason that a run ended with: the last line of ours in its log that is one."""
    if not log.exists():
        return ""
    lines = log.read_text(errors="replace").splitlines()
    reasons = [line for line in lines if line.startswith(("papo: error: ", "papo: stopped: ", "papo: rank "))]
    return reasons[-1].removeprefix("papo: ").removeprefix("error: ") if reasons else ""


def read_refused(sweep: Sweep) -> dict[str, str]:
    """Points that were not submitted, each with its reason; none where the file is gone or damaged: the same command
    finds them again."""
    with suppress(ValueError):
        return {name: str(reason) for name, reason in read_object(sweep.folder / "refused.json").items()}
    return {}


def write_refused(sweep: Sweep, refused: Mapping[str, str]) -> None:
    write_atomically(sweep.folder / "refused.json", json.dumps(refused, indent=1) + "\n")
