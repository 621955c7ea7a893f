"""SWEEP.yaml: a recipe at several numbers of ranks, and the settings of each point.

Strong scaling keeps the batch of a step, weak scaling keeps the batch of a rank: there `train.prompts_per_step` grows
with the ranks, from the first point on. Leaves out whether a point can be: that is `papo check`'s to say.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from megatron_papo.config import Config, ConfigError, load_config
from megatron_papo.config.basics import Count, Section
from megatron_papo.config.values import faults_of_values
from megatron_papo.config.yaml_text import YamlFault, read_mapping

BASICS = (
    "checkpoint.save_every=0",
    "checkpoint.keep_last=1",
    "checkpoint.keep_best=false",
    "checkpoint.export_at_end=false",
    "observe.samples_every=0",
    "data.eval=null",
    "train.eval_every=0",
    "generation.ignore_eos=true",
)
"""Over the recipe and under the sweep's own overrides: what takes time or disk and is no part of a step is off, and all
responses have the same length, so that steps differ by nothing but the ranks."""
INTERVALS = {"range": "least to most", "bootstrap": "95 % interval by bootstrap"}
"""What a spread is, in words."""
_OWN = ("run.dir", "run.name", "train.steps", "cluster.nodes")
_OWN_OF_POINTS = (*_OWN, "cluster.gpus_per_node", "cluster.ranks_per_node", "train.prompts_per_step")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class PointConfig(Section):
    ranks: Count | None = None
    """Ranks of the whole job, on as few nodes as hold them: a node has cluster.gpus_per_node (or ranks_per_node) of
    them."""
    nodes: Count | None = None
    """Whole nodes, instead of ranks."""
    name: str | None = None
    """Name of its folder; null: `ranks_4` or `nodes_2`."""
    overrides: tuple[str, ...] = ()
    """`key.path=value`, which win over the sweep's."""

    @model_validator(mode="after")
    def _check(self) -> PointConfig:
        if (self.ranks is None) == (self.nodes is None):
            raise ValueError("takes one of ranks and nodes")
        _refuse_own(self.overrides, _OWN_OF_POINTS)
        return self

    @property
    def label(self) -> str:
        return self.name or (f"ranks_{self.ranks}" if self.ranks is not None else f"nodes_{self.nodes}")


class Sweep(Section):
    name: str
    """Name of the sweep, of its jobs and figures."""
    dir: Path
    """Everything lies under it: points/NAME is a run, beside table and plot. Relative to the working folder."""
    config: Path | None = None
    """The recipe; relative to SWEEP.yaml's folder."""
    overrides: tuple[str, ...] = ()
    """`key.path=value`, of all points."""
    scaling: Literal["strong", "weak"]
    """Whether the batch of a step stays, or that of a rank."""
    points: Annotated[list[PointConfig], Field(min_length=1)]
    """In the order of the table; speed-up is counted from the first that ran."""
    steps: Annotated[int, Field(ge=1)] = 6
    """Steps of each run."""
    warm_up: Annotated[int, Field(ge=0)] = 1
    """Steps that the figures leave out, after every start of a run."""
    repeats: Count = 1
    """Runs of every point, each with another seed: run.seed, run.seed + 1, ..."""
    interval: Literal["range", "bootstrap"] = "range"
    """What stands beside a median: the least and the most of all measured steps; or its 95 % interval by bootstrap over
    runs and their steps."""
    axes: Literal["linear", "log"] = "linear"
    """Of ranks and tokens a second in the figure; `log` is base 2, in which the ideal is a straight line as well."""
    limit: Count | None = None
    """Jobs that may run at a time; null: as Slurm has room."""
    calibration: Path | Literal["first"] | None = None
    """A file of `tools/plan.py --calibrate`; or `first`: the planner is fitted to the first point, so that what it says
    of the others is a forecast."""
    keep_checkpoints: bool = False
    """Whether every run ends with a checkpoint; else it saves nothing, and what is interrupted begins anew."""

    @model_validator(mode="after")
    def _check(self) -> Sweep:
        if self.warm_up >= self.steps:
            raise ValueError(f"warm_up: leaves out {self.warm_up} of {self.steps} steps")
        names = (run_name(point.label, repeat) for point in self.points for repeat in range(1, self.repeats + 1))
        twice = [name for name, num in Counter(names).items() if num > 1]
        if twice:
            raise ValueError(f"points: {len(twice)} names twice: {', '.join(twice)}")
        for name in (self.name, *(point.label for point in self.points)):
            if not _NAME.fullmatch(name):
                raise ValueError(f"name: {name!r} is no name of a folder: letters, digits, dot, dash, underscore")
        _refuse_own(self.overrides, _OWN)
        return self

    @property
    def folder(self) -> Path:
        return self.dir.absolute()


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    number: int
    """Its place in the file, from 1, those of a repetition behind all before it; its task in a job array."""
    name: str
    """Name of its folder: the point's, and which repetition it is."""
    point: str
    """Name of the point that it is a run of: its row of the table."""
    ranks: int
    run_dir: Path
    """The folder of this point's run, an absolute path."""
    overrides: tuple[str, ...]
    """The settings of this point, which win over the recipe's."""
    fault: str = ""
    """Why these ranks are impossible; empty when they are possible."""


def run_name(label: str, repeat: int) -> str:
    """Folder of one run of a point; `repeat` counts from 1."""
    return label if repeat == 1 else f"{label}_repeat_{repeat}"


def load_sweep(path: Path, more: Sequence[str] = ()) -> Sweep:
    """Reads SWEEP.yaml. `more`: overrides behind the file's. Raises ConfigError, a line a fault, each with file and
    key."""
    try:
        tree = read_mapping(path)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such sweep file") from None
    except YamlFault as fault:
        raise ConfigError(f"{path}: {fault}") from None
    try:
        sweep = Sweep.model_validate(tree)
        sweep = Sweep.model_validate(tree | {"overrides": [*sweep.overrides, *more]})
    except ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {_explain(fault)}" for fault in error.errors())) from None
    faults = list(faults_of_values(sweep.model_dump(exclude={"overrides"})))
    if faults:
        raise ConfigError("\n".join(f"{path}: {fault}" for fault in faults))
    config = sweep.config
    return sweep if config is None else sweep.model_copy(update={"config": path.parent / config})


def points_of(sweep: Sweep) -> list[Point]:
    """The runs of all points in the order of the file, then again for each repetition. Raises ConfigError for common
    settings that are impossible."""
    common = load_config(sweep.config, [*_basics(sweep), *sweep.overrides])
    each = common.cluster.gpus_per_node or common.cluster.ranks_per_node
    assert each is not None, "refused by the section cluster"
    first = _num_ranks(sweep.points[0], each)
    return [_point(sweep, common, number, each, first) for number in range(len(sweep.points) * sweep.repeats)]


def _basics(sweep: Sweep) -> tuple[str, ...]:
    return BASICS if sweep.keep_checkpoints else (*BASICS, "checkpoint.contents=none")


def _point(sweep: Sweep, common: Config, number: int, each: int, first: int) -> Point:
    """The run of that number from 0."""
    again, place = divmod(number, len(sweep.points))
    asked = sweep.points[place]
    name = run_name(asked.label, again + 1)
    ranks, fault = _num_ranks(asked, each), ""
    nodes, rest = divmod(ranks, each) if ranks > each else (1, 0)
    if rest:
        fault = f"ranks: {ranks} are no whole number of nodes of {each}"
    prompts = common.train.prompts_per_step
    if sweep.scaling == "weak":
        prompts, rest = divmod(prompts * ranks, first)
        if rest:
            fault = f"train.prompts_per_step: {common.train.prompts_per_step} x {ranks} / {first} is no whole number"
    own, fault = _config_of(sweep, common, asked, fault) if again else (common, fault)
    run_dir = sweep.folder / "points" / name
    on_node = ranks // nodes
    gpus = on_node if common.cluster.gpus_per_node else 0
    overrides = (
        *_basics(sweep),
        *([f"observe.calibration={sweep.calibration}"] if isinstance(sweep.calibration, Path) else []),
        *sweep.overrides,
        *asked.overrides,
        f"run.dir={run_dir}",
        f"run.name={sweep.name}_{name}",
        *([f"run.seed={own.run.seed + again}"] if again else []),
        f"train.steps={sweep.steps}",
        f"train.prompts_per_step={prompts}",
        f"cluster.nodes={nodes}",
        f"cluster.gpus_per_node={gpus}",
        f"cluster.ranks_per_node={on_node}",
    )
    return Point(number + 1, name, asked.label, ranks, run_dir, overrides, fault)


def _config_of(sweep: Sweep, common: Config, point: PointConfig, fault: str) -> tuple[Config, str]:
    """The settings with a point's own behind them, and `fault` or what is wrong with those: then the common ones."""
    try:
        return load_config(sweep.config, [*_basics(sweep), *sweep.overrides, *point.overrides]), fault
    except ConfigError as error:
        return common, fault or str(error)


def _num_ranks(point: PointConfig, each: int) -> int:
    return point.ranks if point.ranks is not None else (point.nodes or 0) * each


def _refuse_own(overrides: Iterable[str], own: Sequence[str]) -> None:
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals:
            raise ValueError(f"overrides: {override}: is written key.path=value")
        if key in own:
            raise ValueError(f"overrides: {key}: the sweep sets it")


def _explain(fault: Any) -> str:
    """As the settings' own faults: the key's path and what is wrong there."""
    key = ".".join(str(part) for part in fault["loc"] if part != "literal['first']")
    if fault["type"] == "extra_forbidden":
        return f"{key}: unknown key"
    if fault["type"] == "value_error":
        return f"{key}: {fault['msg'].removeprefix('Value error, ')}".removeprefix(": ")
    return f"{key}: {fault['msg']}, got {fault['input']!r}" if fault["type"] != "missing" else f"{key}: is missing"
