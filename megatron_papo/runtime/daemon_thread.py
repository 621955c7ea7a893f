"""Calls in threads that cannot keep a process from ending: one that never returns is left behind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future


def in_daemon_thread[T](name: str, function: Callable[[], T]) -> Future[T]:
    """Calls `function` in a thread called `name`, which a process that ends does not wait for."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            value = function()
        except BaseException as error:  # SystemExit too, which would end the thread without a word
            future.set_exception(error)
        else:
            future.set_result(value)

    future.set_running_or_notify_cancel()
    threading.Thread(target=work, name=name, daemon=True).start()
    return future
