"""The Slurm job that the supervisor runs in, and what it has Slurm do: end a step, try the nodes, queue the job again.

Imports the standard library only, for Python 3.9 and later, as `supervise.py`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass

CLEARING_S = 30.0
"""Seconds for Slurm to clear a step away."""


@dataclass(frozen=True)
class SupervisedJob:
    """The Slurm job that this program is the batch script of."""

    id: str
    nodes: str
    """As Slurm lists them: `node[1-2]`."""
    num_nodes: int

    @classmethod
    def here(cls) -> SupervisedJob:
        """The job of this process, from Slurm's variables. Raises SystemExit outside of a job."""
        names = ("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_JOB_NUM_NODES")
        missing = [name for name in names if name not in os.environ]
        if missing:
            raise SystemExit(f"papo: error: {', '.join(missing)} not set: this runs in a batch script of Slurm")
        return cls(job_id(os.environ), os.environ[names[1]], int(os.environ[names[2]]))

    def steps_left(self) -> list[str]:
        """Names, as `12.0`, of the job's steps beside the batch script."""
        command = ["squeue", "--noheader", "--steps", f"--jobs={self.id}", "--format=%i"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return [name for name in done.stdout.split() if name.rpartition(".")[2].isdigit()]

    def end_step(self, step: subprocess.Popen[bytes]) -> None:
        """Ends the srun `step`: first by Slurm, on all nodes; a step with a rank on a node that is gone may never end
        by itself."""
        step.send_signal(signal.SIGTERM)
        try:
            step.wait(timeout=5)
        except subprocess.TimeoutExpired:
            for left in self.steps_left():  # by name: of the whole job, KILL would be a cancellation
                subprocess.run(["scancel", "--signal=KILL", left], check=False)
            try:
                step.wait(timeout=10)
            except subprocess.TimeoutExpired:
                step.kill()
                step.wait()

    def nodes_answer(self) -> bool:
        """Whether every node of the job starts a process. Waits for the attempt's step to be gone first."""
        deadline = time.monotonic() + CLEARING_S
        while self.steps_left() and time.monotonic() < deadline:
            time.sleep(1)
        nodes = self.num_nodes
        probe = [
            "srun",
            "--overlap",
            f"--nodes={nodes}",
            f"--ntasks={nodes}",
            "--ntasks-per-node=1",
            "--cpus-per-task=1",
        ]
        try:
            return not self.steps_left() and subprocess.run([*probe, "true"], timeout=30, check=False).returncode == 0
        except subprocess.TimeoutExpired:
            return False

    def queue_again(self) -> str | None:
        """None where Slurm queues the job again, else why it does not."""
        done = subprocess.run(["scontrol", "requeue", self.id], capture_output=True, text=True, check=False)
        return done.stderr.strip() if done.returncode else None


def running(job: str) -> str:
    """The number of `job` when Slurm says that it runs, else an empty text."""
    query = ["squeue", "--noheader", f"--jobs={job}", "--states=RUNNING", "--format=%i"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()


def job_id(environ: Mapping[str, str]) -> str:
    """The number of a job; `12_3` for a task of a job array, one of which has the array's own number as SLURM_JOB_ID: a
    command of Slurm that is given that number acts on all tasks."""
    if "SLURM_ARRAY_TASK_ID" in environ:
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ["SLURM_JOB_ID"]
