"""The one shape of a benchmark's result: a figure, what it is compared with, and their ratio."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    name: str
    value: float
    """Ours, in `unit`."""
    baseline: float
    """What it is compared with, in `unit`."""
    ratio: float
    """value / baseline; where both were measured in rounds, the median of the rounds' own ratios."""
    unit: str
