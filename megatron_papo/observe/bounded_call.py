"""A call that may hang is given up after a time: it then goes on in a thread that keeps nobody waiting."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import wait
from typing import Any

from megatron_papo.runtime.daemon_thread import in_daemon_thread


def call_within[T](limit_s: float, call: Callable[[], T]) -> T:
    """What `call` returns; raises what it raises, a wish to exit as RuntimeError, or TimeoutError after `limit_s`."""
    running = in_daemon_thread("bounded call", call)
    if not wait([running], limit_s).done:
        raise TimeoutError(f"no answer within {limit_s:g} s")
    error = running.exception()
    if error is not None and not isinstance(error, Exception):
        raise RuntimeError(_name(error)) from error
    return running.result()


def _name(error: Any) -> str:
    return f"{type(error).__name__}: {error}"
