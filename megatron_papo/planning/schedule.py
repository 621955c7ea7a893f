"""How long a pipeline takes: Megatron-Core's schedules, simulated pass by pass from the seconds of each stage.

One forward one backward (1F1B, Narayanan et al. 2021, arXiv 2104.04473): stage s of p runs p - s - 1 rows forward, then
a row forward and a row backward in turn, then what is left backward. A pass starts when its stage is free and its input
has come. Forward only: every stage one row after the other.
"""

from __future__ import annotations

from collections.abc import Sequence


def forward_backward_s(
    forward: Sequence[float], backward: Sequence[float], num_rows: int, send: float = 0.0
) -> tuple[float, float]:
    """(seconds from the first pass to the last, share of them that the stages stand still on average).

    `forward` and `backward`: of one row on each stage; `send`: of a row between two stages.
    """
    stages = len(forward)
    orders = [_order(stage, stages, num_rows) for stage in range(stages)]
    ends: dict[tuple[str, int, int], float] = {}
    free = [0.0] * stages
    place = [0] * stages
    while any(place[stage] < len(orders[stage]) for stage in range(stages)):
        moved = False
        for stage in range(stages):
            while place[stage] < len(orders[stage]):
                kind, row = orders[stage][place[stage]]
                ready = _ready(kind, stage, row, stages, ends, send)
                if ready is None:
                    break
                seconds = forward[stage] if kind == "forward" else backward[stage]
                free[stage] = max(free[stage], ready) + seconds
                ends[kind, stage, row] = free[stage]
                place[stage] += 1
                moved = True
        assert moved, "every order of 1F1B can be run"
    total = max(free)
    busy = num_rows * (sum(forward) + sum(backward)) / stages
    return total, 1 - busy / total if total else 0.0


def forward_s(forward: Sequence[float], num_rows: int, send: float = 0.0) -> float:
    """Of `num_rows` rows through all stages, forward only: filling, then the slowest stage row by row."""
    if not num_rows:
        return 0.0
    return sum(forward) + (len(forward) - 1) * send + (num_rows - 1) * max(forward)


def _order(stage: int, stages: int, num_rows: int) -> list[tuple[str, int]]:
    warm_up = min(stages - stage - 1, num_rows)
    order = [("forward", row) for row in range(warm_up)]
    for row in range(num_rows - warm_up):
        order += [("forward", row + warm_up), ("backward", row)]
    return order + [("backward", row) for row in range(num_rows - warm_up, num_rows)]


def _ready(
    kind: str, stage: int, row: int, stages: int, ends: dict[tuple[str, int, int], float], send: float
) -> float | None:
    """When the pass has its input; None while it is not known."""
    if kind == "forward":
        return 0.0 if stage == 0 else _after(ends.get(("forward", stage - 1, row)), send)
    if stage == stages - 1:
        return ends.get(("forward", stage, row))
    return _after(ends.get(("backward", stage + 1, row)), send)


def _after(end: float | None, send: float) -> float | None:
    return None if end is None else end + send
