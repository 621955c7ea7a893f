"""The section `observe`: what a run shows on the console, TensorBoard, wandb and pages of samples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from megatron_papo.config.basics import Count, NoAsOff, Positive, Section


class ObserveConfig(Section):
    console: bool = True
    """Whether the console shows the progress and one line for each step."""
    console_every: Count = 1
    """Steps between two such lines; every evaluation has its own line."""
    tensorboard: bool = True
    """Whether TensorBoard's event files are written under run.dir/tensorboard."""
    wandb: Annotated[Literal["off", "offline", "online"], NoAsOff] = "off"
    """Whether metrics go to wandb: not at all, into files under run.dir (offline), or to its server (online).
    An online run without a key, a network or an answer goes on offline, with one warning."""
    wandb_project: str = "megatron_papo"
    """Name of the project in wandb; the run is named run.name there."""
    wandb_entity: str | None = None
    """User or team in wandb that the project belongs to; null: the one that wandb takes by default."""
    wandb_tags: list[str] = []
    """Tags of the run in wandb."""
    samples_every: Annotated[int, Field(ge=0)] = 10
    """Steps between two pages of sampled rollouts; 0: no pages."""
    samples: Count = 8
    """Number of rollouts on a page."""
    profile_step: Annotated[int, Field(ge=0)] | None = None
    """Step, counted from 0, of which every rank writes a trace of torch's profiler under run.dir/profile; that step is
    slower. null: no trace."""
    calibration: Path | None = None
    """File that `tools/plan.py --calibrate` wrote, with the assumptions for the predicted metrics `planned/...` beside
    the measured ones."""
    peak_tflops: Positive | None = None
    """Dense TFLOPS of one GPU in model.dtype, for the metric `mfu`; null: looked up by the GPU's name, without which
    there is no `mfu`."""
    metrics: list[str] = []
    """Own metrics, each written `module:function`: `(rows: list[MetricRow]) -> dict[str, float]` of the responses that
    a rank has trained on in a step; recorded as `own/<name>`. See docs/guides/plug_ins.md."""
