"""What RUN/cluster keeps: job.sh, settings.yaml, and a line a job in jobs.jsonl; and finding a run by folder or job."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_papo.cluster.slurm import QueuedJob, SlurmError, describe_job, my_jobs
from megatron_papo.files.small_files import append_record, made_of, read_records


@dataclass(frozen=True)
class Submission:
    """A job that was submitted for a run."""

    job: str
    submitted: float
    """Unix time of the submission."""
    nodes: int
    chain_position: int
    """Place in its chain of jobs, from 1."""
    chain_length: int
    work_dir: str
    """Where relative paths of the settings begin."""


def folder_of(run_dir: Path) -> Path:
    return run_dir / "cluster"


def record(run_dir: Path, submission: Submission) -> None:
    append_record(folder_of(run_dir) / "jobs.jsonl", asdict(submission))


def submissions(run_dir: Path) -> list[Submission]:
    """The submissions of a run in their order, without lines that a disk has spoilt; empty for a run that was never
    submitted."""
    found = [made_of(Submission, record) for record in read_records(folder_of(run_dir) / "jobs.jsonl")]
    return [entry for entry in found if entry is not None]


def jobs_of(run_dir: Path, jobs: Sequence[QueuedJob] | None = None) -> list[QueuedJob]:
    """The jobs of a run that Slurm remembers, oldest first, by their comment or by jobs.jsonl."""
    known = {entry.job for entry in submissions(run_dir)}
    real = os.path.realpath(run_dir)
    found = my_jobs() if jobs is None else jobs
    return [
        job for job in found if (job.run_dir is not None and os.path.realpath(job.run_dir) == real) or job.id in known
    ]


def living_jobs(run_dir: Path) -> list[QueuedJob]:
    return [job for job in jobs_of(run_dir) if not job.is_over]


def find(run_or_job: str) -> tuple[Path | None, list[QueuedJob]]:
    """The run's folder, None where a job's is not known, and the jobs that are meant, oldest first.

    Raises SlurmError for a folder that is no submitted run, and for a job that Slurm does not know.
    """
    path = Path(run_or_job)
    if re.fullmatch(r"\d+(_\d+)?", run_or_job) and not path.is_dir():
        jobs = [job for job in my_jobs() if job.id == run_or_job]
        if not jobs:
            raise SlurmError(f"job {run_or_job}: Slurm does not know it, or has forgotten it")
        return (None if jobs[0].run_dir is None else Path(jobs[0].run_dir)), jobs
    jobs = jobs_of(path) if path.is_dir() else []
    if not jobs and not submissions(path):
        raise SlurmError(f"{run_or_job}: no run that was submitted: there is no {folder_of(path) / 'jobs.jsonl'}")
    return path, jobs


def log_of(job_id: str, run_dir: Path | None) -> Path | None:
    """Where the job's output goes; None when no one knows any more."""
    said = describe_job(job_id).get("StdOut")
    if said:
        return Path(said)
    guess = None if run_dir is None else folder_of(run_dir) / f"job_{job_id}.log"
    return guess if guess is not None and guess.exists() else None
