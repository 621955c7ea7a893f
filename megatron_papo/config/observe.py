"""The section `observe`: where metrics, samples and traces of a run go."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from megatron_papo.config.basics import Count, NoAsOff, Positive, Section


class ObserveConfig(Section):
    console: bool = True
    """Progress and a line a step."""
    console_every: Count = 1
    """Steps between those lines; every evaluation has its own."""
    tensorboard: bool = True
    """Event files under run.dir/tensorboard."""
    wandb: Annotated[Literal["off", "offline", "online"], NoAsOff] = "off"
    """Offline writes under run.dir."""
    wandb_project: str = "megatron_papo"
    """wandb's project."""
    samples_every: Annotated[int, Field(ge=0)] = 10
    """Steps between pages of samples; 0: none."""
    samples: Count = 8
    """Rollouts on a page."""
    profile_step: Annotated[int, Field(ge=0)] | None = None
    """Step (from 0) of which every rank writes a torch profiler trace under run.dir/profile; that step is slower."""
    calibration: Path | None = None
    """Assumptions of `tools/plan.py --calibrate`, for the figures `planned/...` beside the measured."""
    peak_tflops: Positive | None = None
    """Dense TFLOPS of one GPU in model.dtype, for `mfu`; null: known by the GPU's name, or no `mfu`."""
