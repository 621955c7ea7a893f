"""The arithmetic of layouts: how many ranks hold one copy of the model, and how many copies a number of ranks makes.

The one place that multiplies tensor by pipeline. Imports no torch, so that the command line, the check, the planner and
sweeps count as the ranks themselves do (`layout.py`, which makes the process groups).
"""

from __future__ import annotations

from typing import Protocol


class ModelAxes(Protocol):
    """The axes along which one copy of the model is split: of the settings `parallel`, or of a planner's candidate."""

    @property
    def tensor(self) -> int: ...
    @property
    def pipeline(self) -> int: ...


def model_ranks(axes: ModelAxes) -> int:
    """The number of ranks that together hold one copy of the model: tensor x pipeline."""
    return axes.tensor * axes.pipeline


def data_ranks(axes: ModelAxes, num_ranks: int) -> int:
    """The number of copies of the model on `num_ranks` trainer ranks, rounded down: the data-parallel size."""
    return num_ranks // model_ranks(axes)


def fault_of_ranks(axes: ModelAxes, num_ranks: int) -> str | None:
    """Why `num_ranks` trainer ranks are no whole number of copies of the model; None when they are one or more."""
    if num_ranks >= 1 and num_ranks % model_ranks(axes) == 0:
        return None
    return f"{num_ranks} ranks do not divide by parallel.tensor {axes.tensor} x parallel.pipeline {axes.pipeline}"


def model_ranks_in_words(axes: ModelAxes) -> str:
    """The settings whose product is `model_ranks`, for messages: `parallel.tensor=2 x parallel.pipeline=1`."""
    return f"parallel.tensor={axes.tensor} x parallel.pipeline={axes.pipeline}"
