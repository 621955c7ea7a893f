"""The section `run`: name, folder, seed, and how long a stage or a rank may be silent."""

from __future__ import annotations

from pathlib import Path

from megatron_papo.config.basics import Count, Positive, Section


class RunConfig(Section):
    name: str = "papo"
    """Shown in the sinks."""
    dir: Path = Path("runs/papo")
    """Everything a run writes lies under this folder."""
    seed: int = 0
    """Of the data order, sampling, masks and random weights."""
    stall_limit_s: Positive = 1800.0
    """A stage that makes no progress for this long dumps every rank's Python stack and stops the run; between stages
    too."""
    stage_limits_s: dict[str, Positive] = {}
    """Limits of single stages instead, e.g. `{generate: 3600, save: 600}`; names as in the metrics `time/<stage>`, of a
    stage within another the last part."""
    heartbeat_s: Positive = 5.0
    """Every rank writes a sign of life under run.dir/heartbeats this often, and looks whether another has failed."""
    heartbeat_limit_s: Positive = 60.0
    """A rank whose sign of life is older is taken for dead: the supervisor of a cluster job ends the attempt."""
    max_failures: Count = 3
    """Attempts in a row that may fail at the same step before a cluster job stops with the reason."""
