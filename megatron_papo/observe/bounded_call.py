"""A call that may hang is given up after a time: it then goes on in a thread that keeps nobody waiting."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


def call_within[T](limit_s: float, call: Callable[[], T]) -> T:
    """What `call` returns; raises what it raises, a wish to exit as RuntimeError, or TimeoutError after `limit_s`."""
    result: list[T] = []
    error: list[BaseException] = []

    def work() -> None:
        try:
            result.append(call())
        except BaseException as caught:
            error.append(caught)

    thread = threading.Thread(target=work, name="bounded call", daemon=True)
    thread.start()
    thread.join(limit_s)
    if error:
        raise error[0] if isinstance(error[0], Exception) else RuntimeError(_name(error[0])) from error[0]
    if not result:
        raise TimeoutError(f"no answer within {limit_s:g} s")
    return result[0]


def _name(error: Any) -> str:
    return f"{type(error).__name__}: {error}"
