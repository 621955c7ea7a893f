"""RUN/cluster/stop.json: which jobs of a run were asked to save, end and not queue themselves again.

The supervisor of such a job looks for it, and a job that begins finds it before its ranks start; others of the run are
not concerned, so a run that is resumed goes on. Imports the standard library only, for Python 3.9 and later.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from megatron_papo.files.small_files import read_object, write_atomically


def ask_to_stop(run_dir: Path, jobs: Sequence[str]) -> None:
    """Adds `jobs`, their ids, to those that were asked."""
    asked = [*_asked(run_dir), *jobs]
    write_atomically(_file(run_dir), json.dumps({"jobs": list(dict.fromkeys(asked))}) + "\n")


def is_asked_to_stop(run_dir: Path, job: str) -> bool:
    """Whether `job` was asked; false while the file cannot be read."""
    return job in _asked(run_dir)


def _asked(run_dir: Path) -> list[str]:
    with suppress(OSError, ValueError):
        jobs = read_object(_file(run_dir)).get("jobs")
        return [job for job in jobs if isinstance(job, str)] if isinstance(jobs, list) else []
    return []


def _file(run_dir: Path) -> Path:
    return run_dir / "cluster" / "stop.json"
