"""The section `run`: where a run writes, its seed, and when a stage or a rank counts as stalled."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

from megatron_papo.config.basics import Count, Positive, Section


def _stages_of_today(limits: Any) -> Any:
    """Names of stages had spaces before: `hand over` was what is `hand_over` today."""
    if not isinstance(limits, dict):
        return limits
    return {name.replace(" ", "_") if isinstance(name, str) else name: limit for name, limit in limits.items()}


class RunConfig(Section):
    name: str = "papo"
    """Name of the run: in wandb, and of its job in Slurm's queue."""
    dir: Path = Path("runs/papo")
    """Folder under which a run writes everything."""
    seed: int = 0
    """Seed of the data order, of sampling, of the masks and of random weights."""
    stall_limit_s: Positive = 1800.0
    """Seconds without progress, in a stage or between two stages, after which every rank's Python stack is written and
    the run stops."""
    stage_limits_s: Annotated[dict[str, Positive], BeforeValidator(_stages_of_today)] = {}
    """Limits of single stages in place of run.stall_limit_s, e.g. `{generate: 3600, save: 600}`. The names are those of
    the metrics `time/<stage>`; of a stage within another, the last part."""
    heartbeat_s: Positive = 5.0
    """Seconds between two signs of life that every rank writes under run.dir/heartbeats; it then also looks whether
    another rank has failed."""
    heartbeat_limit_s: Positive = 60.0
    """A rank whose last sign of life is older than this is taken for dead: the supervisor of a cluster job ends the
    attempt."""
    max_failures: Count = 3
    """Attempts in a row that may fail at the same step before a cluster job stops with the reason."""
