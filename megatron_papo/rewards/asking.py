"""Asks a function about many rows: so many calls at a time, each for a limited time, and failed rows again.

The caller's thread does the planning, so that a signal such as Ctrl-C is heeded while calls run. A row that failed for
the last time has a `Failed` in place of a value; nothing is raised for it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from typing import Any

from megatron_papo.rewards.returned import Failed, Value, failed_with, read_returned
from megatron_papo.rewards.reward_row import RewardRow
from megatron_papo.rewards.starters import Starter

FIRST_PAUSE_S = 1.0
"""Pause before rows are asked for again, doubled each time; half as much again by chance, so that not all come back at
the same moment."""
_LONGEST_PAUSE_S = 60.0
_CHANCE = random.SystemRandom()
"""The random numbers of a run stay as they are."""


@dataclass(frozen=True)
class CallLimits:
    concurrency: int
    """Calls at a time."""
    timeout_s: float
    """Seconds that a call may take."""
    retries: int
    """How often a row that failed is asked for again."""


@dataclass(frozen=True)
class _Waiting:
    """Rows that a call will be made with."""

    places: tuple[int, ...]
    tries: int = 0
    not_before: float = 0.0


@dataclass(frozen=True)
class _Running:
    asked: _Waiting
    call: Future[Any]
    deadline: float


class Asking:
    """`wait` until it is true; then `values` has one entry a row. The first call begins with the first `wait`."""

    def __init__(self, starter: Starter, batches: Sequence[Sequence[RewardRow]], limits: CallLimits) -> None:
        """`batches`: the rows of each call."""
        self._starter, self._limits = starter, limits
        self._rows = [row for batch in batches for row in batch]
        self._values: dict[int, Value | Failed] = {}
        self._waiting: list[_Waiting] = []
        self._running: list[_Running] = []
        start = 0
        for batch in batches:
            if batch:
                self._waiting.append(_Waiting(tuple(range(start, start + len(batch)))))
            start += len(batch)

    @property
    def progress(self) -> tuple[int, int]:
        """Rows that are settled, and all rows."""
        return len(self._values), len(self._rows)

    @property
    def values(self) -> list[Value | Failed]:
        """The value of each row, in the order of the batches."""
        return [self._values[place] for place in range(len(self._rows))]

    def wait(self, seconds: float) -> bool:
        """Makes calls and takes their results for at most `seconds`. Returns whether all rows are settled."""
        end = time.monotonic() + seconds
        while self._waiting or self._running:
            self._start_calls()
            self._take_results()
            now = time.monotonic()
            if now >= end or not (self._waiting or self._running):
                break
            self._sleep_until(min([end, *self._moments()]), now)
        return not (self._waiting or self._running)

    def _start_calls(self) -> None:
        """Begins the calls that are due, as many as may run at a time."""
        for asked in list(self._waiting):
            if len(self._running) >= self._limits.concurrency:
                break
            now = time.monotonic()
            if asked.not_before > now:
                continue
            self._waiting.remove(asked)
            try:
                call = self._starter.start([self._rows[place] for place in asked.places])
            except Exception as error:  # no thread could be started
                self._settle(asked, [failed_with(error)] * len(asked.places))
            else:
                self._running.append(_Running(asked, call, now + self._limits.timeout_s))

    def _take_results(self) -> None:
        """Takes what has returned, and gives up what has run out of time."""
        for running in list(self._running):
            late = time.monotonic() >= running.deadline
            if not running.call.done() and not late:
                continue
            self._running.remove(running)
            if running.call.done():
                self._settle(running.asked, _result(running.call, len(running.asked.places)))
            else:
                self._starter.give_up(running.call)
                reason = f"failed: TimeoutError: no answer within reward.function_timeout_s={self._limits.timeout_s:g}"
                self._settle(running.asked, [Failed(reason)] * len(running.asked.places))

    def _settle(self, asked: _Waiting, values: Sequence[Value | Failed]) -> None:
        """Keeps the values; rows that failed wait for another call, unless this was the last."""
        last, again = asked.tries >= self._limits.retries, []
        for place, value in zip(asked.places, values, strict=True):
            if isinstance(value, Failed) and not last:
                again.append(place)
            else:
                self._values[place] = value
        if again:
            pause = min(FIRST_PAUSE_S * 2**asked.tries, _LONGEST_PAUSE_S) * _CHANCE.uniform(1.0, 1.5)
            self._waiting.append(_Waiting(tuple(again), asked.tries + 1, time.monotonic() + pause))

    def _moments(self) -> list[float]:
        """When something is due even though no call returns."""
        pauses = [asked.not_before for asked in self._waiting] if self._may_start else []
        return [*pauses, *(running.deadline for running in self._running)]

    @property
    def _may_start(self) -> bool:
        return len(self._running) < self._limits.concurrency

    def _sleep_until(self, moment: float, now: float) -> None:
        if moment <= now:
            return
        if self._running:
            wait_for([running.call for running in self._running], moment - now, FIRST_COMPLETED)
        else:
            time.sleep(moment - now)


def _result(call: Future[Any], num_rows: int) -> list[Value | Failed]:
    try:
        return read_returned(call.result(), num_rows)
    except BaseException as error:  # what the user's function raised, SystemExit too
        return [failed_with(error)] * num_rows
