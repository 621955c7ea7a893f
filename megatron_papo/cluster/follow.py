"""Follows jobs from the terminal: changes of their state, and the output as it grows, until they end."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import BinaryIO

from megatron_papo.cluster import run_records
from megatron_papo.cluster.slurm import QueuedJob, SlurmError, find_job
from megatron_papo.text.untrusted import LINES, as_text

_LOOK_S = 1.0
_BUSY_S = 5.0
_LOST_LOOKS = 5
"""A job that Slurm does not know for so many looks in a row is over."""


def follow(job_id: str, run_dir: Path | None, from_start: bool = True) -> int:
    """Prints until the job has ended; 0 when it completed. Interrupted, the job goes on."""
    tail = _Tail(None if run_dir is None else run_records.folder_of(run_dir) / f"job_{job_id}.log", from_start)
    shown, missing = "", 0
    while True:
        try:
            job = find_job(job_id)
        except SlurmError:  # a controller that is busy; the job goes on
            tail.show()
            time.sleep(_BUSY_S)
            continue
        missing = 0 if job else missing + 1
        state = _state(job) if job else shown
        if state != shown:
            tail.show()  # what it wrote before comes before
            print(as_text(f"submit: job {job_id}: {state}"), file=sys.stderr, flush=True)
            shown = state
        if tail.path is None and job and job.state != "PENDING":
            tail.path = run_records.log_of(job_id, run_dir)
        tail.show()
        if (job and job.is_over) or missing >= _LOST_LOOKS:
            time.sleep(_LOOK_S)  # a shared disk may show the last lines a moment later
            tail.show()
            return 0 if job and job.state == "COMPLETED" else 1
        time.sleep(_LOOK_S)


def _state(job: QueuedJob) -> str:
    nodes = f"{job.num_nodes} node{'s' * (job.num_nodes > 1)}"
    if job.state == "PENDING":
        return f"pending ({job.reason}), {nodes}"
    return f"{job.state.lower().replace('_', ' ')} on {nodes}" if not job.is_over else job.state.lower()


class _Tail:
    """The part of a growing file that was not shown yet."""

    def __init__(self, path: Path | None, from_start: bool):
        self.path, self._from_start = path, from_start
        self._file: BinaryIO | None = None

    def show(self) -> None:
        if self._file is None:
            if self.path is None or not self.path.exists():
                self._from_start = True  # a log that is made while we look is shown whole
                return
            self._file = self.path.open("rb")
            self._file.seek(0, 0 if self._from_start else 2)
        text = self._file.read()
        if text:
            sys.stdout.write(as_text(text.decode(errors="replace"), LINES + "\r"))
            sys.stdout.flush()
