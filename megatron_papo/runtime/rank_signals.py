"""What signals do to local ranks: those that come to the launcher, and those by which it ends the ranks.

Every rank leads a process group of its own, so nothing reaches it from a terminal by itself, and what it has started
gets the same as it does.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from typing import Any

from megatron_papo.runtime.process import remember

_STOP_S = 3.0
"""From SIGTERM to SIGKILL."""
_END = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that end a run; those that were ignored when it began, as SIGHUP under nohup, go on being so."""


@contextmanager
def signals_to(ranks: Sequence[BaseProcess]) -> Iterator[None]:
    """What comes to this process reaches the ranks, which have process groups of their own. SIGINT, SIGTERM and SIGHUP
    end the block, with the usual exit codes of 130, 143 and 129; a second one does not disturb that."""

    def end(number: int, frame: Any) -> None:
        ignore_ends()
        if number == signal.SIGINT:
            with suppress(OSError):
                os.write(2, b"papo: interrupted\n")
        raise SystemExit(128 + number)

    def save(number: int, frame: Any) -> None:
        remember()
        forward(ranks, signal.SIGUSR1)

    handlers: dict[int, Callable[[int, Any], None]] = dict.fromkeys(_END, end)
    handlers |= {signal.SIGTSTP: lambda *_: _pause(ranks), signal.SIGUSR1: save}
    before = {number: signal.getsignal(number) for number in handlers}
    try:
        for number, handler in handlers.items():
            if before[number] is not signal.SIG_IGN:
                signal.signal(number, handler)
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, signal.SIG_DFL if earlier is None else earlier)


def ignore_ends() -> None:
    """The end is under way: a second signal is not to disturb it."""
    for number in _END:
        signal.signal(number, signal.SIG_IGN)


def _pause(ranks: Sequence[BaseProcess]) -> None:
    """Stops the ranks, then this process, until somebody has it go on."""
    for process in ranks:
        _signal_group(process, signal.SIGSTOP)
    os.kill(os.getpid(), signal.SIGSTOP)
    for process in ranks:
        _signal_group(process, signal.SIGCONT)


def stop(ranks: Sequence[BaseProcess]) -> None:
    """Ends every rank that still runs, and whatever any rank had started: SIGTERM first, for the stacks."""
    alive = [process for process in ranks if process.is_alive()]
    for process in alive:
        _signal_group(process, signal.SIGTERM)
    deadline = time.monotonic() + _STOP_S
    for process in alive:
        process.join(max(0.0, deadline - time.monotonic()))
    for process in ranks:
        _signal_group(process, signal.SIGKILL)
        if process.pid is not None:
            process.join()


def forward(ranks: Sequence[BaseProcess], number: signal.Signals) -> None:
    for process in ranks:
        if process.is_alive() and process.pid is not None:
            with suppress(ProcessLookupError):  # just ended
                os.kill(process.pid, number)


def _signal_group(process: BaseProcess, number: signal.Signals) -> None:
    if process.pid is None:
        return
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:  # the group is empty, or the rank has not yet made it
        if process.is_alive():
            os.kill(process.pid, number)
