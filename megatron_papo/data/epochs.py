"""The rows of every epoch, in the order in which they are drawn: shuffled, sorted by a column, or as a sampler says.

An epoch is one pass through the rows that a stage draws from: all of them, but where `data.curriculum` restricts them.
`RowOrder` lays epochs end to end and says which row lies at a position. What it computes depends on the data, the
settings and the seed alone, so that every rank finds the same row and a resumed run goes on with the same one.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megatron_papo.data.fingerprint import fingerprint
from megatron_papo.data.random_state import random_state

EpochRows = Callable[[int, np.ndarray], np.ndarray]
"""(epoch, the rows that its stage may draw, ascending [N] int64) -> the rows of that epoch in order, [M] int64."""


@dataclass(frozen=True)
class Stage:
    """A part of the run that draws from some of the rows. It lasts so many epochs or prompts, or else for ever."""

    rows: np.ndarray
    """The numbers of these rows, ascending, [N] int64."""
    epochs: int | None = None
    prompts: int | None = None


@dataclass(frozen=True)
class _Epoch:
    """Where an epoch lies in the sequence of all prompts."""

    number: int
    stage: int
    first_of_stage: int
    """The position at which its stage begins."""
    epochs_of_stage: int
    """Epochs of the stage before this one."""
    start: int
    length: int
    """Prompts that are drawn of it: fewer than it has rows where its stage ends."""

    @property
    def end(self) -> int:
        return self.start + self.length


class RowOrder:
    """Which row comes at which position: the epochs of the stages, end to end. The last stage has no end."""

    def __init__(self, stages: Sequence[Stage], epoch_rows: EpochRows) -> None:
        assert stages and stages[-1].epochs is None and stages[-1].prompts is None, "the last stage has no end"
        self._stages, self._epoch_rows = stages, epoch_rows
        self._epochs: list[_Epoch] = []
        self._lock = threading.Lock()  # the thread that reads ahead, and whoever saves the state
        self._rows = lru_cache(maxsize=4)(self._rows_of)

    def at(self, position: int) -> tuple[int, int, np.ndarray]:
        """The epoch that `position` lies in, its place there, and all rows of the epoch in order, [M] int64."""
        with self._lock:
            while not self._epochs or position >= self._epochs[-1].end:
                self._append()
            epoch = self._epochs[bisect_right(self._epochs, position, key=lambda epoch: epoch.start) - 1]
            return epoch.number, position - epoch.start, self._rows(epoch.number, epoch.stage)

    def num_prompts(self, epochs: float) -> int:
        """Prompts of the first `epochs` epochs; of the last one the part that is asked for, rounded up."""
        before = max(math.ceil(epochs), 1) - 1
        with self._lock:
            while len(self._epochs) <= before:  # no further: a sampler may have no more epochs
                self._append()
            last = self._epochs[before]
        return last.start + math.ceil(round((epochs - before) * last.length, 6))

    def fingerprint(self) -> str:
        """A few letters that stand for the stages and the rows of the first epoch of each."""
        stages = [repr((stage.epochs, stage.prompts)).encode() for stage in self._stages]
        rows = [self._rows(0, number).astype("<i8").tobytes() for number in range(len(self._stages))]
        return fingerprint([*stages, *rows])

    def _append(self) -> None:
        number, stage, first, before, start = len(self._epochs), 0, 0, 0, 0
        if self._epochs:
            last = self._epochs[-1]
            stage, first, before = last.stage, last.first_of_stage, last.epochs_of_stage + 1
            start = last.end
            limits = self._stages[stage]
            if before == limits.epochs or (limits.prompts is not None and start >= first + limits.prompts):
                stage, first, before = stage + 1, start, 0
        length, most = len(self._rows(number, stage)), self._stages[stage].prompts
        if not length:
            raise ValueError(
                f"data.sampler: none of the rows that it gives epoch {number} is one that data.curriculum[{stage}] "
                "draws from"
            )
        if most is not None:
            length = min(length, first + most - start)
        self._epochs.append(_Epoch(number, stage, first, before, start, length))

    def _rows_of(self, number: int, stage: int) -> np.ndarray:
        return self._epoch_rows(number, self._stages[stage].rows)


def shuffled_rows(seed: int) -> EpochRows:
    """Every epoch its own shuffle, drawn from (seed, epoch)."""
    return lambda epoch, rows: rows[random_state("order", seed, epoch).permutation(len(rows))]


def rows_as_they_are(epoch: int, rows: np.ndarray) -> np.ndarray:
    """The order of the data set, in every epoch."""
    return rows
