"""A histogram as inline SVG, for pages that open offline."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_BARS = 32
_WIDTH, _HEIGHT, _FOOT = 320, 90, 16
_SKEWED = 20
"""Where the most is this many times the median, bars stand for equal ratios and not for equal differences."""


def histogram(values: Sequence[int]) -> str:
    """Bars of how many values lie where, with least and most below them; a bar's title names its range and count."""
    edges = _edges(np.asarray(values))
    counts, _ = np.histogram(values, edges)
    width = _WIDTH / len(counts)
    bars = "".join(
        f'<rect x="{index * width:.1f}" y="{_HEIGHT - height:.1f}" width="{max(width - 1, 1):.1f}" '
        f'height="{height:.1f}"><title>{_range(edges, index)}: {count:,}</title></rect>'
        for index, count in enumerate(counts)
        if (height := max(_HEIGHT * count / counts.max(), 1.0 if count else 0.0))
    )
    foot = f'y="{_HEIGHT + _FOOT - 3}"'
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT + _FOOT}" role="img">{bars}'
        f'<line x1="0" x2="{_WIDTH}" y1="{_HEIGHT}" y2="{_HEIGHT}"/>'
        f'<text x="0" {foot}>{min(values):,}</text>'
        f'<text x="{_WIDTH}" {foot} text-anchor="end">{max(values):,}</text></svg>'
    )


def _edges(values: np.ndarray) -> np.ndarray:
    """Of the bars: one for each whole number where they are few, and the last one closed."""
    least, most = int(values.min()), int(values.max())
    if most - least < _BARS:
        return np.arange(least, most + 2) - 0.5
    if least > 0 and most > _SKEWED * float(np.median(values)):
        return np.geomspace(least, most, _BARS + 1)
    return np.linspace(least, most, _BARS + 1)


def _range(edges: np.ndarray, index: int) -> str:
    low, high = edges[index], edges[index + 1]
    return f"{(low + high) / 2:,.0f}" if high - low == 1 else f"{low:,.0f} to {high:,.0f}"
