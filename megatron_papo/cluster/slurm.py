"""Calls of Slurm's own commands, and their refusals as one line. Nothing here knows of runs or settings."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ENDED = frozenset(
    ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT")
)
"""States in which a job will not run any more."""
COMMENT = "papo:"
"""A job's comment is this and its run's folder: so the queue knows which run a job belongs to."""
_FIELDS = "%i|%T|%D|%r|%M|%k"  # the comment comes last: it may hold any sign


class SlurmError(ValueError):
    """Slurm is not there, or refuses; the reason in one line."""


@dataclass(frozen=True)
class QueuedJob:
    """A job of this user as squeue shows it; ended ones too, for as long as the controller remembers them."""

    id: str
    """`12`; of a task of a job array `12_3`."""
    state: str
    num_nodes: int
    reason: str
    """Why it waits; `None` where there is nothing to say."""
    running_for: str
    run_dir: str | None
    """The run's folder; None: no job of this package."""

    @property
    def is_over(self) -> bool:
        return self.state in ENDED


def sbatch(script: str, options: Sequence[str] = ()) -> str:
    """Submits the file; the job's id. Raises SlurmError with Slurm's own words."""
    said = _call("sbatch", "--parsable", *options, script)
    return said.strip().partition(";")[0]


def my_jobs() -> list[QueuedJob]:
    """This user's jobs, oldest first."""
    lines = _call("squeue", "--me", "--array", "--states=all", "--noheader", f"--format={_FIELDS}").splitlines()
    return sorted(
        (_job(line) for line in lines if line.count("|") >= 5), key=lambda job: int(re.split(r"[_+]", job.id)[0])
    )


def find_job(job_id: str) -> QueuedJob | None:
    """The job; None where Slurm does not know it, or has forgotten it."""
    return next((job for job in my_jobs() if job.id == job_id), None)


def describe_job(job_id: str) -> dict[str, str]:
    """`scontrol show job` by key; empty for a job that Slurm does not know."""
    try:
        said = _call("scontrol", "show", "job", job_id)
    except SlurmError:
        return {}
    lines = (line.strip().partition("=") for line in said.splitlines())
    single = {"Command", "WorkDir", "StdOut", "StdErr", "Comment"}  # alone on their lines, with spaces as they are
    fields: dict[str, str] = {}
    for key, _, value in lines:
        if key in single:
            fields[key] = value.strip()
        else:
            fields |= dict(word.split("=", 1) for word in f"{key}={value}".split() if "=" in word)
    return fields


def cancel(job_ids: Sequence[str]) -> None:
    _call("scancel", *job_ids)


def signal_script(job_id: str, name: str) -> None:
    """Sends the signal `name` to the batch script of a running job, and to none of its steps."""
    _call("scancel", "--batch", f"--signal={name}", job_id)


def set_comment(job_id: str, run_dir: Path) -> None:
    """Says which run a job is of, as its script's head does where the script is the run's own."""
    _call("scontrol", "update", f"JobId={job_id}", f"Comment={COMMENT}{run_dir}")


def _job(line: str) -> QueuedJob:
    job_id, state, nodes, reason, time, comment = line.split("|", 5)
    run_dir = comment.strip().removeprefix(COMMENT) if comment.startswith(COMMENT) else None
    return QueuedJob(job_id, state, int(nodes), reason, time, run_dir)


def _call(command: str, *arguments: str) -> str:
    if shutil.which(command) is None:
        raise SlurmError(f"{command} is not in PATH: submit from a login node of a Slurm cluster")
    done = subprocess.run([command, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line.removeprefix(f"{command}: ").removeprefix("error: ") for line in done.stderr.splitlines()]
        raise SlurmError(f"{command}: {'; '.join(line for line in said if line.strip()) or 'failed without a word'}")
    return done.stdout
