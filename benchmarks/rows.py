"""The form of every benchmark's result: a figure, the baseline it is compared with, and their ratio."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One figure of a benchmark."""

    name: str
    value: float
    """The figure of our side, in `unit`."""
    baseline: float
    """The figure that it is compared with, in `unit`."""
    ratio: float
    """The ratio value / baseline; where both were measured in rounds, the median of the ratios of the rounds."""
    unit: str
