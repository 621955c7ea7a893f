"""What the runs of a sweep measured: a row a point, medians over the steps after the warm-up with their interval.

Speed-up and efficiency are of tokens a second, against the first point that ran; so they read the same for strong and
for weak scaling: the ideal is that twice the ranks make twice the tokens. The planner's seconds, which every run
records beside its own (`planned/time/...`), stand beside them.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_papo.cluster import run_records
from megatron_papo.cluster.attempts import read_attempts
from megatron_papo.config import Config, ConfigError, load_config
from megatron_papo.costs.stages import PLANNED_STAGES, STEP_STAGES
from megatron_papo.distributed.rank_arithmetic import data_ranks
from megatron_papo.files.small_files import read_records
from megatron_papo.observe.old_names import with_new_names
from megatron_papo.sweep.points import Point, Sweep
from megatron_papo.sweep.states import State

STAGES = (*PLANNED_STAGES, *(stage for stage in STEP_STAGES if stage not in PLANNED_STAGES))
"""All stages of a step in the order of the table, those that are planned first."""
Record = Mapping[str, float]
_DRAWS = 1000
"""Number of draws of the bootstrap."""


@dataclass(frozen=True)
class Spread:
    """Median and interval of one figure over the measured steps of all runs of a point."""

    median: float
    low: float
    high: float
    """The interval is what `Sweep.interval` says."""


@dataclass(frozen=True)
class Row:
    """One point of the sweep: a row of the table."""

    name: str
    state: State
    ranks: int
    layout: str = ""
    """Ranks along tensor x pipeline x data: `2x1x4`."""
    prompts: int | None = None
    """Prompts per step."""
    num_runs: int = 0
    """Number of runs that the figures are taken from."""
    num_steps: int = 0
    """Number of their steps."""
    gpu_hours: float | None = None
    """Ranks times hours of everything that the runs did so far, failed attempts and loading included; under Slurm
    alone."""
    figures: Mapping[str, Spread] = field(default_factory=dict)
    """`tokens_per_s`, `gpu_hours_per_mtoken`, `step_s`, seconds by stage, `mfu`, `memory_gib`, `planned_step_s`,
    `planned_tokens_per_s` and the planner's seconds by stage; those that the run recorded."""
    speed_up: float | None = None
    ideal: float | None = None
    """Speed-up of ranks that all do as much as one of the first point."""

    @property
    def efficiency(self) -> float | None:
        return None if self.speed_up is None or not self.ideal else self.speed_up / self.ideal

    def median(self, figure: str) -> float | None:
        spread = self.figures.get(figure)
        return None if spread is None else spread.median


def gather(sweep: Sweep, points: Sequence[Point], states: Mapping[str, State]) -> list[Row]:
    """The rows of the table in the order of the file, each of all runs of a point. Points without a measured step have
    a row without figures."""
    factors: dict[str, float] = {}
    rows = []
    for name in dict.fromkeys(point.point for point in points):
        runs = [point for point in points if point.point == name]
        measured = [records for run in runs if (records := measured_steps(run, sweep.warm_up))]
        if sweep.calibration == "first" and measured and not factors:
            factors = fitted([record for records in measured for record in records])
        rows.append(_row(runs, [states[run.name] for run in runs], measured, factors, sweep.interval))
    return against_first(rows)


def _row(
    runs: Sequence[Point],
    states: Sequence[State],
    measured: Sequence[Sequence[Record]],
    factors: Mapping,
    interval: str,
) -> Row:
    row = Row(runs[0].point, state_of_all(states), runs[0].ranks, gpu_hours=gpu_hours(runs))
    if (config := next(filter(None, map(_settings, runs)), None)) is not None:
        parallel = config.parallel
        trainer = int(measured[0][0]["ranks"]) if measured else row.ranks  # separate engines have ranks too
        layout = f"{parallel.tensor}x{parallel.pipeline}x{data_ranks(parallel, trainer)}"
        row = replace(row, layout=layout, prompts=config.train.prompts_per_step)
    figures = figures_of(measured, row.ranks, factors, interval)
    return replace(row, num_runs=len(measured), num_steps=sum(map(len, measured)), figures=figures)


def state_of_all(states: Sequence[State]) -> State:
    """The state of a point of several runs: that of the first run that is not done."""
    return next((state for state in states if state.word != "done"), states[0])


def gpu_hours(runs: Sequence[Point]) -> float | None:
    """Ranks times hours of all attempts that have ended; None where none has."""
    ended = [attempt for run in runs for attempt in read_attempts(run.run_dir) if attempt.ended]
    return sum(attempt.ranks * (attempt.ended - attempt.began) for attempt in ended) / 3600 if ended else None


def against_first(rows: Sequence[Row]) -> list[Row]:
    """The rows with speed-up and its ideal, from the first row that has tokens a second."""
    first = next((row for row in rows if row.median("tokens_per_s")), None)
    base = None if first is None else first.median("tokens_per_s")
    if first is None or not base:
        return list(rows)
    compared = []
    for row in rows:
        speed = row.median("tokens_per_s")
        if speed:
            row = replace(row, speed_up=speed / base, ideal=row.ranks / first.ranks)
        compared.append(row)
    return compared


def measured_steps(point: Point, warm_up: int) -> list[Record]:
    """The records of steps without the `warm_up` steps after every start, the first and those after a checkpoint."""
    starts = {0, *(attempt.steps_saved for attempt in read_attempts(point.run_dir))}
    left_out = {start + step for start in starts for step in range(warm_up)}
    records: dict[int, dict[str, Any]] = {}
    for record in map(with_new_names, read_records(point.run_dir / "metrics.jsonl")):
        if isinstance(record.get("step"), int):
            records[record["step"]] = record
    return [record for step, record in sorted(records.items()) if step not in left_out and "tokens_per_s" in record]


def figures_of(
    runs: Sequence[Sequence[Record]], ranks: int, factors: Mapping[str, float], interval: str = "range"
) -> dict[str, Spread]:
    """The figures of a row from the measured steps of its runs. `factors`: what the planner's seconds of a stage are
    multiplied with; 1 for those that it lacks. `ranks`: those that are paid for, of separate engines too."""
    taken: dict[str, Callable[[Record], float | None]] = {
        "tokens_per_s": lambda record: record["tokens_per_s"],
        "tokens_per_s_per_rank": lambda record: record["tokens_per_s"] / record["ranks"],
        "gpu_hours_per_mtoken": lambda record: ranks * 1e6 / record["tokens_per_s"] / 3600,
        "mfu": lambda record: record.get("mfu"),
        "step_s": step_seconds,
        "memory_gib": _memory_gib,
        "planned_step_s": lambda record: planned_seconds(record, factors),
        "planned_tokens_per_s": lambda record: _planned_speed(record, factors),
    }
    for stage in STAGES:
        taken[f"{stage}_s"] = lambda record, stage=stage: record.get(f"time/{stage}")  # type: ignore[misc]
    for stage in PLANNED_STAGES:
        taken[f"planned_{stage}_s"] = lambda record, stage=stage: _planned_stage(record, stage, factors)  # type: ignore[misc]
    figures = {}
    for name, take in taken.items():
        known = [[value for record in records if (value := take(record)) is not None] for records in runs]
        if known := [values for values in known if values]:
            figures[name] = spread_of(known, interval)
    return figures


def spread_of(runs: Sequence[Sequence[float]], interval: str = "range") -> Spread:
    """Median of all values, a list a run, with their range, or with the 95 % interval of the median by bootstrap: runs
    are drawn with replacement, then steps within each drawn run. The draws are the same every time."""
    values = [value for run in runs for value in run]
    if interval == "range":
        return Spread(statistics.median(values), min(values), max(values))
    chance = random.Random(0)
    medians = []
    for _ in range(_DRAWS):
        drawn = [chance.choice(runs) for _ in runs]
        medians.append(statistics.median(value for run in drawn for value in chance.choices(run, k=len(run))))
    cuts = statistics.quantiles(medians, n=40, method="inclusive")
    middle = statistics.median(values)
    return Spread(middle, min(cuts[0], middle), max(cuts[-1], middle))  # equal values may differ in their last bit


def fitted(records: Sequence[Record]) -> dict[str, float]:
    """Measured over planned seconds by stage, as medians: as `tools/plan.py --calibrate` fits them to a run."""
    factors = {}
    for stage in PLANNED_STAGES:
        plans = [record.get(f"planned/time/{stage}", 0.0) for record in records]
        ratios = [record.get(f"time/{stage}", 0.0) / plan for record, plan in zip(records, plans) if plan > 0]
        if ratios:
            factors[stage] = statistics.median(ratios)
    return factors


def step_seconds(record: Record) -> float:
    return sum(record.get(f"time/{stage}", 0.0) for stage in STAGES)


def planned_seconds(record: Record, factors: Mapping[str, float]) -> float | None:
    """Planned seconds of a step, of the stages that the planner knows; None where it did not know the GPU."""
    stages = [_planned_stage(record, stage, factors) for stage in PLANNED_STAGES]
    known = [seconds for seconds in stages if seconds is not None]
    return sum(known) if known else None


def _planned_stage(record: Record, stage: str, factors: Mapping[str, float]) -> float | None:
    seconds = record.get(f"planned/time/{stage}")
    return None if seconds is None else seconds * factors.get(stage, 1.0)


def _planned_speed(record: Record, factors: Mapping[str, float]) -> float | None:
    planned = planned_seconds(record, factors)
    return record["tokens_per_s"] * step_seconds(record) / planned if planned else None


def _memory_gib(record: Record) -> float | None:
    """The highest memory of any stage, on the rank that holds most."""
    return max((value for name, value in record.items() if name.startswith("memory_gib/")), default=None)


def _settings(point: Point) -> Config | None:
    """The settings with which the point was submitted last; None before, and where they cannot be read."""
    kept = run_records.folder_of(point.run_dir) / "settings.yaml"
    try:
        return load_config(kept, to_run=False) if kept.exists() else None
    except ConfigError:
        return None
