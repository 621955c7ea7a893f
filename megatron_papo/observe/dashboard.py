"""The dozen charts to look at first: what they show, in their order. docs/metrics.md says what to see in them.

TensorBoard gets them as a layout of its custom scalars, wandb as copies of their metrics in a section that comes first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

OVERVIEW = "0_overview"
"""wandb makes a section of what stands before a slash and sorts sections by name."""


@dataclass(frozen=True)
class Chart:
    """One chart with one or more metrics as curves."""

    title: str
    metrics: tuple[str, ...]
    best: Literal["max", "min", "last"] = "last"
    """What a table of runs should show of the first metric."""


CHARTS = (
    Chart("reward", ("reward", "trained/reward"), "max"),
    Chart("accuracy", ("reward/accuracy", "eval/accuracy"), "max"),
    Chart("perception KL", ("perception_kl",)),
    Chart("gamma after schedule and guard", ("perception_coef",)),
    Chart("entropy", ("entropy", "masked_entropy")),
    Chart("response tokens", ("response_tokens", "response_tokens_p99")),
    Chart("share of responses cut off", ("cut_off",)),
    Chart("share of tokens clipped", ("clip_fraction",)),
    Chart("gradient norm", ("optim/grad_norm",)),
    Chart("gap between engine and trainer", ("rollout_gap",)),
    Chart("seconds of a step", ("time/step",), "min"),
    Chart("tokens a second of a GPU", ("tokens_per_s_per_gpu",), "max"),
)


def best_of(chart: Chart) -> str:
    """How wandb summarises the chart's metrics."""
    return chart.best if chart.best == "last" else f"{chart.best},last"


def with_overview(values: Mapping[str, float]) -> dict[str, float]:
    """The metrics, and those of the charts once more under names that sort first, numbered in the charts' order."""
    copies = {
        f"{OVERVIEW}/{number:02}_{name.replace('/', '_')}": values[name]
        for number, chart in enumerate(CHARTS, 1)
        for name in chart.metrics
        if name in values
    }
    return {**values, **copies}
