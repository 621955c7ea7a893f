"""How long a pipeline takes: Megatron-Core's schedules, simulated pass by pass from the seconds of each stage.

One forward one backward (1F1B, Narayanan et al. 2021, arXiv 2104.04473): stage s of p runs p - s - 1 rows forward, then
a row forward and a row backward in turn, then what is left backward. A pass starts when its stage is free and its input
has come. Forward only: every stage one row after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


def forward_backward_s(
    forward: Sequence[float], backward: Sequence[float], num_rows: int, sends: Sequence[float] = ()
) -> tuple[float, float]:
    """Returns (seconds from the first pass to the last, share of them that the stages stand still on average).

    `forward` and `backward`: of one row on each stage; `sends`: of a row from each stage to the next, and of its
    gradient back; without them sending takes no time.
    """
    stages = len(forward)
    sends = sends or [0.0] * (stages - 1)
    before, after = (0.0, *sends), (*sends, 0.0)
    lines = [_StageSchedule(min(stages - stage - 1, num_rows)) for stage in range(stages)]
    while any(len(line.backward) < num_rows for line in lines):
        num_run = sum(len(line.forward) + len(line.backward) for line in lines)
        for stage, line in enumerate(lines):
            above = lines[stage - 1].forward if stage else None
            below = lines[stage + 1].backward if stage + 1 < stages else None
            line.run(num_rows, forward[stage], backward[stage], above, below, before[stage], after[stage])
        assert sum(len(line.forward) + len(line.backward) for line in lines) > num_run, "every order of 1F1B can be run"
    total = max((line.free for line in lines), default=0.0)
    busy = num_rows * (sum(forward) + sum(backward)) / stages
    return total, max(0.0, 1 - busy / total) if total else 0.0  # not below 0 by rounding


@dataclass
class _StageSchedule:
    """The passes of one stage, in their order."""

    warm_up: int
    """Rows that go forward before the first comes back."""
    forward: list[float] = field(default_factory=list)
    """When each row's forward pass ended."""
    backward: list[float] = field(default_factory=list)
    free: float = 0.0

    def run(
        self,
        num_rows: int,
        forward_s: float,
        backward_s: float,
        above: list[float] | None,
        below: list[float] | None,
        send_above: float,
        send_below: float,
    ) -> None:
        """Runs as many passes as have their input. `above`: forward ends of the stage before; `below`: backward ends of
        the stage after; None where there is none. The last two: seconds that a row takes from the one, and its gradient
        from the other."""
        forward, backward, free = self.forward, self.backward, self.free
        while (row := len(backward)) < num_rows:
            ahead = len(forward)
            if ahead < num_rows and ahead - row <= self.warm_up:
                if above is not None and len(above) <= ahead:
                    break
                free = max(free, 0.0 if above is None else above[ahead] + send_above) + forward_s
                forward.append(free)
            else:
                if below is not None and len(below) <= row:
                    break
                free = max(free, forward[row] if below is None else below[row] + send_below) + backward_s
                backward.append(free)
        self.free = free


def forward_s(forward: Sequence[float], num_rows: int, sends: Sequence[float] = ()) -> float:
    """Seconds of `num_rows` rows through all stages, forward only: filling, then the slowest stage row by row."""
    if not num_rows:
        return 0.0
    return sum(forward) + sum(sends) + (num_rows - 1) * max(forward)
