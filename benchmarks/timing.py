"""Seconds of several sides, measured in turns: on a busy machine only what runs side by side can be compared.

Seconds are by default processor seconds of this process, in which every side runs on one thread: on an idle machine
those of the clock, and on a busy one much less disturbed by other processes. A round runs every side once. Each side's
figure is its median over the rounds; a ratio is the median of the rounds' own ratios, so that a slow minute of the
machine, which affects both sides of a round, does not change it.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rich.console import Console

from benchmarks.rows import Row


@dataclass(frozen=True)
class Seconds:
    """The seconds of every round, by side; all sides have the same number of rounds."""

    of: dict[str, list[float]]

    def median(self, side: str) -> float:
        return statistics.median(self.of[side])

    def ratio(self, side: str, baseline: str) -> float:
        """The median over the rounds of side / baseline."""
        return statistics.median(own / other for own, other in zip(self.of[side], self.of[baseline], strict=True))

    def fastest(self) -> str:
        """The side with the least median."""
        return min(self.of, key=self.median)

    def rows(self, name: str, side: str, baseline: str, tokens: int) -> list[Row]:
        """The two sides in tokens a second and in seconds."""
        own, other, ratio = self.median(side), self.median(baseline), self.ratio(side, baseline)
        inverse = statistics.median(b / a for a, b in zip(self.of[side], self.of[baseline], strict=True))
        return [Row(name, tokens / own, tokens / other, inverse, "tokens/s"), Row(name, own, other, ratio, "s")]


def measure(
    sides: Mapping[str, Callable[[], object]],
    rounds: int,
    what: str | None = "",
    clock: Callable[[], float] = time.process_time,
) -> Seconds:
    """Runs every side once a round, in turns; the order is reversed every other round. `what`: said of each; None: no
    word, as on ranks beside the first."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    console = Console(stderr=True)
    for index in range(rounds):
        for name in list(sides)[:: -1 if index % 2 else 1]:
            gc.collect()
            before = clock()
            sides[name]()
            seconds[name].append(clock() - before)
            if what is not None:
                console.print(f"[dim]{what}: round {index + 1} of {rounds}: {name}: {seconds[name][-1]:.2f} s[/dim]")
    return Seconds(seconds)
