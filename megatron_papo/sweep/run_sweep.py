"""What `tools/sweep.py` does: begins or goes on with a sweep, waits for it, and shows what it measured."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from megatron_papo.cluster import run_records
from megatron_papo.cluster.slurm import QueuedJob, SlurmError, my_jobs
from megatron_papo.preflight.inputs import fault_of_folder
from megatron_papo.sweep.gather import Row, gather
from megatron_papo.sweep.local import run_points
from megatron_papo.sweep.plot import compared_figure, sweep_figure
from megatron_papo.sweep.points import Point, Sweep, points_of
from megatron_papo.sweep.states import LIVING, State, states_of, write_refused
from megatron_papo.sweep.submit_points import CheckedPoints, arrays_of, check_points, submit_arrays
from megatron_papo.sweep.sweep_page import print_table, write_tables
from megatron_papo.text.untrusted import as_text

_LOOK_S = 2.0
_SETTLE_S = 60.0
"""Slurm gives a cancelled job 30 seconds to end."""


def begin(
    sweep: Sweep, points: Sequence[Point], made_from: str, *, dry_run: bool = False, local: bool = False, retry: bool
) -> bool:
    """Submits the points that are not done and not in the queue; with `local` runs them. Whether none was refused."""
    if faults := fault_of_folder("dir", sweep.dir):
        raise ValueError(faults[0])
    checked = check_points(sweep, points, made_from, local)
    jobs = _jobs_if_any() if dry_run or local else _settled_jobs(points)
    states = states_of(sweep, points, jobs)
    kept = ("done", *LIVING, *(() if retry else ("failed",)))
    for each in checked:
        _tell(each, states[each.point.name], states[each.point.name].word in kept)
    refused = {each.point.name: each.reason for each in checked if each.plan is None}
    chosen = [each for each in checked if each.plan is not None and states[each.point.name].word not in kept]
    living = [job.id for point in points for job in run_records.jobs_of(point.run_dir, jobs) if not job.is_over]
    arrays = [] if local else arrays_of(sweep, chosen, made_from, len(living))
    if dry_run:
        for array in arrays:
            print(array.script)
        return not refused
    sweep.folder.mkdir(parents=True, exist_ok=True)
    write_refused(sweep, refused)
    if local:
        run_points(chosen, say)
        return not refused
    submitted, by_slurm = submit_arrays(sweep, arrays, living)
    write_refused(sweep, refused | by_slurm)
    for name, reason in by_slurm.items():
        say(f"{name}: refused: {reason}")
    say(f"submitted: {', '.join(submitted) or 'nothing'}")
    return not refused and not by_slurm


def wait(sweep: Sweep, points: Sequence[Point]) -> None:
    """Says what changes, until no point is in the queue. Interrupted, the jobs go on."""
    shown: dict[str, State] = {}
    while True:
        try:
            states = states_of(sweep, points, my_jobs())
        except SlurmError:  # a controller that is busy; the jobs go on
            time.sleep(_LOOK_S)
            continue
        for name, state in states.items():
            if state.word != shown.get(name, State("new")).word:
                say(f"{name}: {state.word}" + (f": {state.reason}" if state.reason else ""))
        shown = states
        if not any(state.word in LIVING for state in states.values()):
            return
        time.sleep(_LOOK_S)


def finish(sweep: Sweep, points: Sequence[Point], others: Sequence[Sweep] = ()) -> int:
    """Prints the table and writes it with its figure, and with one of this sweep beside `others`; 0 when all points are
    done, else 1."""
    states = states_of(sweep, points, _jobs_if_any())
    rows = gather(sweep, points, states)
    print_table(rows, sweep)
    files = write_tables(rows, sweep)
    files += sweep_figure(rows, sweep, sweep.folder / "plot")
    if others:
        files += compared_figure(
            [(sweep, rows), *((other, _rows_of(other)) for other in others)], sweep.folder / "compared"
        )
    say(f"written: {', '.join(str(file) for file in files)}")
    return 0 if all(state.word == "done" for state in states.values()) else 1


def _rows_of(sweep: Sweep) -> list[Row]:
    """What another sweep has measured so far."""
    points = points_of(sweep)
    return gather(sweep, points, states_of(sweep, points, _jobs_if_any()))


def say(text: str) -> None:
    print(f"sweep: {as_text(text)}", file=sys.stderr, flush=True)


def _tell(each: CheckedPoints, state: State, kept: bool) -> None:
    if each.plan is None:
        say(f"{each.point.name}: refused: {each.reason}")
    elif kept:
        say(f"{each.point.name}: {state.word}" + (f": {state.reason}" if state.word == "failed" else ""))
    else:
        for warning in each.plan.warnings:
            say(f"{each.point.name}: warning: {warning}")
        say(f"{each.point.name}: {each.plan.checked}" + (" (again)" if state.word in ("failed", "interrupted") else ""))


def _settled_jobs(points: Sequence[Point]) -> list[QueuedJob]:
    """The jobs, once none of the points' jobs is ending any more: one that was just cancelled shows its state then."""
    deadline, said = time.monotonic() + _SETTLE_S, False
    while True:
        jobs = my_jobs()
        ending = [
            job.id for point in points for job in run_records.jobs_of(point.run_dir, jobs) if job.state == "COMPLETING"
        ]
        if not ending or time.monotonic() > deadline:
            return jobs
        if not said:
            say(f"waits for {', '.join(ending)} to end")
        said = True
        time.sleep(_LOOK_S)


def _jobs_if_any() -> list[QueuedJob]:
    """None on a machine without Slurm: a sweep may have run here, or be looked at from elsewhere."""
    try:
        return my_jobs()
    except SlurmError:
        return []
