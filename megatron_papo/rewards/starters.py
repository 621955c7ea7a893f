"""Two ways to call a function without waiting for it: in a thread of its own, or in one event loop for all calls.

Nothing here can keep a process from ending: every thread is a daemon, so a call that never returns is left behind.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

from megatron_papo.rewards.reward_row import RewardRow
from megatron_papo.runtime.daemon_thread import in_daemon_thread

_MOST_LEFT_BEHIND = 100
"""Threads of calls that ran out of time and still run; with more of them, calls fail until some have returned."""
_STOP_S = 2.0


class Starter(Protocol):
    """Begins calls of a function with a list of rows."""

    def start(self, rows: Sequence[RewardRow]) -> Future[Any]:
        """What the call will return, or raise."""

    def give_up(self, call: Future[Any]) -> None:
        """Nobody waits for this call any more."""

    def close(self) -> None: ...


class ThreadStarter:
    """Calls a plain function, each time in a thread of its own. A thread cannot be ended from outside."""

    def __init__(self, function: Callable[[list[RewardRow]], Any]) -> None:
        self._function = function
        self._left_behind: list[Future[Any]] = []

    def start(self, rows: Sequence[RewardRow]) -> Future[Any]:
        self._left_behind = [call for call in self._left_behind if not call.done()]
        if len(self._left_behind) >= _MOST_LEFT_BEHIND:
            raise RuntimeError(f"{len(self._left_behind)} calls that ran out of time still run")
        return in_daemon_thread("reward.function", partial(self._function, list(rows)))

    def give_up(self, call: Future[Any]) -> None:
        self._left_behind.append(call)

    def close(self) -> None:
        pass


class LoopStarter:
    """Calls an `async def`: all calls share one event loop, so that they can share a client, in one thread."""

    def __init__(self, function: Callable[[list[RewardRow]], Awaitable[Any]]) -> None:
        self._function = function
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self, rows: Sequence[RewardRow]) -> Future[Any]:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._loop.set_default_executor(_DaemonThreads())
            self._thread = threading.Thread(target=self._loop.run_forever, name="reward.function", daemon=True)
            self._thread.start()
        return asyncio.run_coroutine_threadsafe(self._call(list(rows)), self._loop)

    def give_up(self, call: Future[Any]) -> None:
        call.cancel()

    def close(self) -> None:
        if self._loop is None:
            return
        with suppress(TimeoutError):  # not waited for for ever: the function may block the loop
            asyncio.run_coroutine_threadsafe(_cancel_all(), self._loop).result(_STOP_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_STOP_S)
        if not self._thread.is_alive():
            self._loop.close()
        self._loop = None

    async def _call(self, rows: list[RewardRow]) -> Any:
        return await self._function(rows)


async def _cancel_all() -> None:
    """Ends the tasks of the running loop."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class _DaemonThreads(ThreadPoolExecutor):
    """For `asyncio.to_thread`: Python waits for the threads of its own pool before it ends, for ever if need be."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return in_daemon_thread("reward.function", partial(fn, *args, **kwargs))
