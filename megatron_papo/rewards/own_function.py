"""The user's own `reward.function`, in one of two forms.

`(rows) -> list`, plain or `async def`, is asked through `Asking`: several calls at a time, with a time limit, rows that
failed again. `(response, answer, problem) -> float` is called in the trainer's main thread, one response after the
other, without a time limit.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from megatron_papo.config import RewardConfig
from megatron_papo.config.user_function import load_user_function, name_of_function
from megatron_papo.rewards.asking import Asking, CallLimits
from megatron_papo.rewards.returned import Failed, Value, failed_with, read_returned
from megatron_papo.rewards.reward_row import RewardRow
from megatron_papo.rewards.starters import LoopStarter, Starter, ThreadStarter

_KEY = "reward.function"
_ROWS, _THREE = ("rows",), ("response", "answer", "problem")
_ASYNC_CALLS = 32
"""Calls of an `async def` at a time where reward.concurrency is null."""


class OwnFunction:
    """The function that reward.function names; `close` it at the end."""

    def __init__(self, reward: RewardConfig, name: str) -> None:
        """Raises ValueError naming reward.function for a function that cannot be imported, or is of neither form."""
        self._function, form = load_user_function(_KEY, name, _THREE, _ROWS)
        self.takes_rows = form == _ROWS or _first_argument(self._function) == "rows"
        """Whether it is of the form with rows."""
        self.name = name_of_function(self._function)
        is_async = _is_async(self._function)
        if is_async and not self.takes_rows:
            raise ValueError(f"{_KEY}: {name} is async and must take (rows)")
        self._rows_per_call = reward.rows_per_call
        concurrency = reward.concurrency or (_ASYNC_CALLS if is_async else 1)
        self._limits = CallLimits(concurrency, reward.function_timeout_s, reward.retries)
        self._starter: Starter = LoopStarter(self._function) if is_async else ThreadStarter(self._function)

    def ask(self, groups: Sequence[Sequence[RewardRow]]) -> Asking:
        """Begins to ask for the values of these rows, a list for each prompt; for the form with rows."""
        rows = [row for group in groups for row in group]
        batches = {"one": [[row] for row in rows], "group": groups, "all": [rows]}[self._rows_per_call]
        return Asking(self._starter, batches, self._limits)

    def call(self, row: RewardRow) -> Value | Failed:
        """The best value over the right answers; for the form with three arguments."""
        try:
            value = max(float(self._function(row.response, answer, row.problem)) for answer in row.answers)
        except Exception as error:  # the user's function may raise anything
            return failed_with(error)
        return read_returned([value], 1)[0]

    def close(self) -> None:
        self._starter.close()


def _first_argument(function: Callable[..., Any]) -> str:
    return next(iter(inspect.signature(function).parameters), "")


def _is_async(function: Callable[..., Any]) -> bool:
    called = getattr(type(function), "__call__", None)  # noqa: B004 (an object with an `async def __call__`)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(called)
