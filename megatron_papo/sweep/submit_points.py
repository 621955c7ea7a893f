"""Checks the points of a sweep and submits them: one Slurm job array for all points that ask for the same resources.

Task N of an array is point N of the file and becomes that point's own job script (exec, so that Slurm's signals reach
it). `limit` holds over all arrays: as many arrays as fit in it run side by side, and the next wait for them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_papo.cluster import run_records
from megatron_papo.cluster.render import array_script, sbatch_options
from megatron_papo.cluster.slurm import SlurmError, sbatch, set_comment
from megatron_papo.cluster.submit import SubmissionPlan, plan, write
from megatron_papo.config import ConfigError, load_config
from megatron_papo.files.small_files import write_atomically
from megatron_papo.preflight.check import check_everything
from megatron_papo.sweep.points import Point, Sweep

_MAY_CHANGE = ("cluster.", "train.steps", "run.", "observe.")
"""Settings that a point may go on with in another way than it began."""


@dataclass(frozen=True)
class CheckedPoints:
    point: Point
    plan: SubmissionPlan | None
    """None: the point is refused."""
    reason: str = ""


@dataclass(frozen=True)
class Array:
    """Points that one sbatch submits."""

    members: tuple[CheckedPoints, ...]
    script: str
    wave: int
    """Those of a later wave wait for all of the earlier ones."""


def check_points(sweep: Sweep, points: Sequence[Point], made_from: str, local: bool = False) -> list[CheckedPoints]:
    """Every point by `papo check`; `local` leaves out what only a job needs.

    Raises ConfigError for one that was begun with other settings: its figures would be of neither.
    """
    return [_check(sweep, point, made_from, local) for point in points]


def _check(sweep: Sweep, point: Point, made_from: str, local: bool) -> CheckedPoints:
    if point.fault:
        return CheckedPoints(point, None, point.fault)
    try:
        made = _plan_local(sweep, point) if local else plan(sweep.config, point.overrides, made_from)
    except ConfigError as error:
        return CheckedPoints(point, None, "; ".join(str(error).splitlines()))
    changed = _changed(point, made)
    if changed:
        raise ConfigError(
            f"{point.run_dir}: was begun with other settings ({', '.join(changed[:3])}): take another dir, "
            "or remove that folder"
        )
    return CheckedPoints(point, made)


def _plan_local(sweep: Sweep, point: Point) -> SubmissionPlan:
    config = load_config(sweep.config, point.overrides)
    checked = check_everything("train", config, config.cluster.num_ranks)
    if checked.faults:
        raise ConfigError("\n".join(checked.faults))
    return SubmissionPlan(config, "", checked.summary, tuple(checked.warnings))


def _changed(point: Point, made: SubmissionPlan) -> list[str]:
    """Keys of which the steps that the point has recorded had other values."""
    kept = run_records.folder_of(point.run_dir) / "settings.yaml"
    if not (point.run_dir / "metrics.jsonl").exists() or not kept.exists():
        return []
    before, now = (_flat(config.model_dump(mode="json")) for config in (load_config(kept), made.config))
    return [key for key in now if before.get(key) != now[key] and not key.startswith(_MAY_CHANGE)]


def _flat(tree: dict[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{above}{key}.") if isinstance(value, dict) and value else {f"{above}{key}": value}
    return flat


def arrays_of(sweep: Sweep, chosen: Sequence[CheckedPoints], made_from: str, busy: int = 0) -> list[Array]:
    """`busy`: jobs of this sweep that are in the queue already; with a limit the first arrays wait for them."""
    groups: dict[tuple[str, ...], list[CheckedPoints]] = {}
    for each in chosen:
        assert each.plan is not None
        asked = [option for option in sbatch_options(each.plan.config) if not option.startswith("--job-name=")]
        groups.setdefault(tuple(asked), []).append(each)
    waves = waves_of([len(members) for members in groups.values()], sweep.limit, busy)
    return [
        Array(tuple(members), _script(sweep, options, members, made_from), wave)
        for (options, members), wave in zip(groups.items(), waves)
    ]


def waves_of(sizes: Iterable[int], limit: int | None, busy: int = 0) -> list[int]:
    """The wave of each array, from 0, such that in none more than `limit` jobs run; all in one without a limit."""
    waves, wave, taken = [], 0, busy
    for size in sizes:
        size = size if limit is None else min(size, limit)
        if limit is not None and taken and taken + size > limit:
            wave, taken = wave + 1, 0
        waves.append(wave)
        taken += size
    return waves


def _script(sweep: Sweep, options: Sequence[str], members: Sequence[CheckedPoints], made_from: str) -> str:
    scripts = {each.point.number: run_records.folder_of(each.point.run_dir) / "job.sh" for each in members}
    at_a_time = "" if sweep.limit is None else f"%{sweep.limit}"
    array = ",".join(map(str, scripts)) + at_a_time
    own = [f"--job-name={sweep.name}", *options, f"--array={array}"]
    return array_script(own, scripts, work_dir=Path.cwd(), folder=sweep.folder / "cluster", made_from=made_from)


def submit_arrays(
    sweep: Sweep, arrays: Sequence[Array], living: Sequence[str] = ()
) -> tuple[list[str], dict[str, str]]:
    """Writes the points' folders and submits; the arrays' ids, and what Slurm refused: its words by point.

    `living`: jobs of this sweep that are in the queue; arrays of later waves wait for them too.
    """
    (sweep.folder / "cluster").mkdir(parents=True, exist_ok=True)
    jobs: list[str] = []
    refused: dict[str, str] = {}
    waves: dict[int, list[str]] = {}
    for array in arrays:
        before = [*(living if array.wave else []), *waves.get(array.wave - 1, [])]
        after = [f"--dependency=afterany:{':'.join(before)}"] if before else []
        for each in array.members:
            assert each.plan is not None
            write(each.plan)
            (run_records.folder_of(each.point.run_dir) / "local.json").unlink(missing_ok=True)
        script = sweep.folder / "cluster" / "array.sh"
        write_atomically(script, array.script)
        try:
            jobs.append(sbatch(str(script), after))
        except SlurmError as error:
            refused |= {each.point.name: str(error) for each in array.members}
            script.unlink()
            waves.setdefault(array.wave, []).extend(before)  # what comes after waits for what this one waited for
            continue
        script.rename(script.with_name(f"array_{jobs[-1]}.sh"))
        waves.setdefault(array.wave, []).append(jobs[-1])
        for each in array.members:
            _record(sweep, each, jobs[-1])
    return jobs, refused


def _record(sweep: Sweep, checked: CheckedPoints, array: str) -> None:
    """The task as a job of its run: in jobs.jsonl, by its comment, and with its log where the run's logs are."""
    point, job = checked.point, f"{array}_{checked.point.number}"
    assert checked.plan is not None
    nodes = checked.plan.config.cluster.nodes
    run_records.record(point.run_dir, run_records.Submission(job, round(time.time(), 1), nodes, 1, 1, str(Path.cwd())))
    folder = run_records.folder_of(point.run_dir)
    log = folder / f"job_{job}.log"
    log.unlink(missing_ok=True)
    log.symlink_to(os.path.relpath(sweep.folder / "cluster" / f"job_{job}.log", folder))
    with suppress(SlurmError):  # where a cluster forbids it, `list` knows the task from its start on
        set_comment(job, point.run_dir)
