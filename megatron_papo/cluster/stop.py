"""Asking the jobs of a run to save, end and not queue themselves again: those that run by a signal and a file, those
that wait by taking them out of the queue."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from megatron_papo.cluster.slurm import QueuedJob, SlurmError, cancel, signal_script
from megatron_papo.cluster.stop_request import ask_to_stop


def stop(run_dir: Path, jobs: Sequence[QueuedJob]) -> Iterator[str]:
    """Stops `jobs`, which are not over; a line for what became of them."""
    ask_to_stop(run_dir, [job.id for job in jobs])
    waiting = [job.id for job in jobs if job.state == "PENDING"]
    if waiting:
        cancel(waiting)
        yield f"cancelled job{'s' * (len(waiting) > 1)} {', '.join(waiting)}, which waited"
    for job in jobs:
        if job.id not in waiting:
            with suppress(SlurmError):  # it is just ending, or starting: it finds the file
                signal_script(job.id, "USR1")
            yield (
                f"job {job.id} ends after its step and saves what checkpoint.contents says; `submit_slurm.py resume "
                f"{run_dir}` goes on from the newest checkpoint"
            )
