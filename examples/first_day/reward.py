"""The own reward of docs/first_day.md: an exact count is right, a count that is off by one is worth a little."""

from __future__ import annotations

from megatron_papo.rewards import RewardRow
from megatron_papo.rewards.answers import last_box


def score(rows: list[RewardRow]) -> list[dict[str, float]]:
    """The parts `accuracy` (1 for the exact count) and `close` (1 for a count that is off by one) of each response."""
    return [_parts(row) for row in rows]


def _parts(row: RewardRow) -> dict[str, float]:
    counted = (last_box(row.response) or "").strip()
    if not (counted.isascii() and counted.isdigit() and len(counted) <= 3):
        return {"accuracy": 0.0, "close": 0.0}  # the response is a model's: it may hold anything
    off_by = abs(int(counted) - row.columns["squares"])
    return {"accuracy": float(off_by == 0), "close": float(off_by == 1)}
