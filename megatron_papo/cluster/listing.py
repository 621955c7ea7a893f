"""The runs that Slurm knows, as a table: state, nodes, folder, how far they are, attempts, why they wait."""

from __future__ import annotations

import os
import sys
from dataclasses import astuple, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_papo.cluster import run_records
from megatron_papo.cluster.attempts import read_attempts
from megatron_papo.cluster.slurm import QueuedJob, my_jobs
from megatron_papo.config import ConfigError, load_config, plain_tree
from megatron_papo.runtime.progress import planned_steps, read_progress
from megatron_papo.text.untrusted import as_text

_HEAD = ("job", "state", "nodes", "time", "steps", "attempts", "run", "")


@dataclass(frozen=True)
class ListedRun:
    job: str
    state: str
    nodes: str
    time: str
    steps: str
    """Recorded steps, of how many."""
    attempts: str
    run: str
    reason: str
    """Why it waits, or how the last attempt ended."""


def listing() -> list[ListedRun]:
    """A line for every job of ours that is not over, and for each other run its newest job that Slurm remembers, as
    long as its folder is there."""
    jobs = [job for job in my_jobs() if job.run_dir is not None]
    busy = {job.run_dir for job in jobs if not job.is_over}
    newest = {job.run_dir: job for job in jobs if Path(str(job.run_dir)).is_dir()}  # the later ones win
    last = [job for job in newest.values() if job.run_dir not in busy]
    return [_line(job) for job in jobs if not job.is_over or job in last]


def print_listing(lines: list[ListedRun]) -> None:
    """A table in a terminal, else plain lines with tabs between."""
    if not lines:
        print("no jobs of ours in the queue")
    elif sys.stdout.isatty():
        table = Table(*_HEAD)
        for line in lines:
            table.add_row(*map(Text, _cells(line)))
        Console().print(table)
    else:
        print("\n".join("\t".join(cells) for cells in (_HEAD, *map(_cells, lines))))


def _cells(line: ListedRun) -> list[str]:
    return [as_text(cell) for cell in astuple(line)]


def _line(job: QueuedJob) -> ListedRun:
    run_dir = Path(str(job.run_dir))
    attempts = read_attempts(run_dir)
    reason = job.reason if job.state == "PENDING" else ""
    if job.is_over and attempts and attempts[-1].end not in ("", "done"):
        reason = f"{attempts[-1].end}: {attempts[-1].reason}".rstrip(": ")
    done, wanted = read_progress(run_dir).steps_done, _num_steps(run_dir)
    return ListedRun(
        job.id,
        job.state.lower(),
        str(job.num_nodes),
        job.running_for,
        f"{done} of {wanted}" if wanted else str(done),
        str(len(attempts)),
        os.path.relpath(run_dir) if run_dir.is_relative_to(Path.cwd()) else str(run_dir),
        reason,
    )


def _num_steps(run_dir: Path) -> int | None:
    for name in ("settings.json", "settings.yaml"):  # the launcher's, with what stood behind sbatch; the tool's
        try:
            config = load_config(run_records.folder_of(run_dir) / name, to_run=False)
            return planned_steps(run_dir, plain_tree(config))
        except (OSError, ConfigError):
            continue
    return None
