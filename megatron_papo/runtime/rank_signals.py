"""What signals do to local ranks: those that come to the launcher, and those by which it ends the ranks.

Every rank leads a process group of its own. So no signal of a terminal reaches it directly, and the processes that it
has started get the same signals as the rank.
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
"""Seconds from SIGTERM to SIGKILL."""
_END = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that end a run, except those that were ignored when it began, such as SIGHUP under nohup."""

_ENDS_SOON = (
    b"papo: interrupted: the run ends after its step and saves what checkpoint.contents says "
    b"(Ctrl-C again: leave at once)\n"
)


@contextmanager
def signals_to(ranks: Sequence[BaseProcess], saves: bool = False) -> Iterator[None]:
    """A context in which signals to this process are passed on to the ranks. SIGINT, SIGTERM and SIGHUP
    end the block, with the usual exit codes of 130, 143 and 129; a second one does not disturb that.

    `saves`: ranks that are asked to can save and end. The first SIGINT then asks them, and the second one ends the
    block."""
    asked = False

    def interrupt(number: int, frame: Any) -> None:
        nonlocal asked
        if asked or not saves:
            end(number, frame)
        asked = True
        with suppress(OSError):
            os.write(2, _ENDS_SOON)
        save(number, frame)

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
    handlers |= {signal.SIGINT: interrupt, signal.SIGTSTP: lambda *_: _pause(ranks), signal.SIGUSR1: save}
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
    """Ignores the signals that end a run, so that a second one does not disturb the end."""
    for number in _END:
        signal.signal(number, signal.SIG_IGN)


def _pause(ranks: Sequence[BaseProcess]) -> None:
    """Stops the ranks, then this process, until it is continued."""
    for process in ranks:
        _signal_group(process, signal.SIGSTOP)
    os.kill(os.getpid(), signal.SIGSTOP)
    for process in ranks:
        _signal_group(process, signal.SIGCONT)


def stop(ranks: Sequence[BaseProcess]) -> None:
    """Ends every rank that still runs, and all processes that ranks had started: SIGTERM first, which writes stacks."""
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
