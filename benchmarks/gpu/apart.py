"""Work in a process of its own: rows come as they are made, a result at the end, and the device keeps nothing of it.

Whatever a failure holds of a GPU's memory goes with its process, and a process that dies or takes too long leaves the
rows that it had made. A process must not have used CUDA before it forks another: CUDA does not survive a fork.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.gpu.rows import Failed, GpuRow, reason_of, show_failure

Rows = Generator[GpuRow, None, Any]
"""Rows, and at the end what `yield from` gives."""
_PR_SET_PDEATHSIG = 1


def apart(function: Callable[..., Rows], *args: Any, start: str = "fork", limit_s: float | None = None) -> Rows:
    """The rows and the result of `function(*args)`, called in a process of its own.

    `start`: multiprocessing's method; rows and result are pickled. Raises torch.OutOfMemoryError where the function
    does, and Failed where it raises anything else, its process dies, or it takes longer than `limit_s` seconds.
    """
    if start == "fork" and torch.cuda.is_initialized():
        raise RuntimeError("this process has used CUDA, which a forked one could not use again")
    context: Any = multiprocessing.get_context(start)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(sender, os.getpid() if start == "fork" else None, function, args))
    process.start()
    sender.close()
    try:
        return (yield from _received(receiver, process, limit_s))
    finally:
        if process.is_alive():
            process.kill()
        process.join()
        receiver.close()


def result_apart(function: Callable[..., Any], *args: Any) -> Any:
    """What `function(*args)` returns, called in a process forked from this one: it may use CUDA."""
    rows = apart(_without_rows, function, args)
    try:
        next(rows)
    except StopIteration as end:
        return end.value
    raise AssertionError("it makes no rows")


def _without_rows(function: Callable[..., Any], args: tuple[Any, ...]) -> Rows:
    yield from ()
    return function(*args)


def end_with_parent(parent: int | None = None) -> None:
    """This process is killed when the one that started it ends, which is `parent` where that is known."""
    with suppress(AttributeError):  # elsewhere than on Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def _received(receiver: Connection, process: Any, limit_s: float | None) -> Rows:
    end = None if limit_s is None else time.monotonic() + limit_s
    while True:
        left = None if end is None else max(end - time.monotonic(), 0.0)
        if not receiver.poll(left):
            raise Failed(f"took longer than {limit_s:.0f} s")
        try:
            kind, value = pickle.loads(receiver.recv_bytes())
        except (EOFError, OSError):
            raise Failed(_how_it_ended(process)) from None
        if kind == "row":
            yield value
        elif kind == "result":
            process.join(None if end is None else max(end - time.monotonic(), 1.0))
            return value
        else:
            raise torch.OutOfMemoryError(value) if kind == "out of memory" else Failed(value)


def _how_it_ended(process: Any) -> str:
    process.join()
    if process.exitcode < 0:
        return f"its process was ended by {signal.Signals(-process.exitcode).name}"
    return f"its process ended with {process.exitcode}"


def _work(sender: Connection, parent: int | None, function: Callable[..., Rows], args: tuple[Any, ...]) -> None:
    from benchmarks.quiet import quieten

    end_with_parent(parent)
    quieten()

    def send(kind: str, value: Any) -> None:
        sender.send_bytes(pickle.dumps((kind, value)))  # `send` would share a tensor's memory, which ends with us

    rows = function(*args)
    try:
        while True:
            send("row", next(rows))
    except StopIteration as end:
        send("result", end.value)
    except Exception as error:
        show_failure(error)
        send("out of memory" if isinstance(error, torch.OutOfMemoryError) else "failed", reason_of(error))
