"""The section `run`: where a run writes, its seed, and when a stage or a rank counts as stalled."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, model_validator

from megatron_papo.config.basics import Count, Positive, Section

_LONGEST_TMP = 70
"""Letters: sockets lie in it, whose names Linux limits to 107."""


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
    cache_dir: Path | None = None
    """Folder for what libraries keep between runs: the hub's models and data sets, kernels of Triton, vLLM and CUDA (by
    node, for nodes that write into one folder disturb each other), wandb's files. Null: their own places under HOME. A
    variable of a library that is set already (HF_HUB_CACHE, TRITON_CACHE_DIR, ...) wins."""
    tmp_dir: Path | None = None
    """Folder for temporary files (TMPDIR), of at most 70 letters, on a disk of the machine itself; null: the system's
    own. It is made where it is not there."""
    offline: bool = False
    """Whether the libraries are told that there is no network: the hub's, transformers, datasets, wandb and vLLM take
    what the disk has and ask nobody."""
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

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        if self.tmp_dir is not None and len(os.path.abspath(self.tmp_dir)) > _LONGEST_TMP:
            raise ValueError(f"run.tmp_dir: {self.tmp_dir}: longer than {_LONGEST_TMP} letters, sockets find no room")
        return self
