"""What a program of the project does before anything else: takes over what it inherits from whoever started it.

    sys.exit(command(main))      at the end of a program

Standard streams that are closed, or break later; signals that are ignored or blocked; a working folder that is gone.
SIGUSR1, by which a cluster job asks a run to save, would end a process that does not expect it: it is remembered from
here on, and the run heeds it once it can (`runtime/stop_signal.py`). Two kinds of programs write to a stream that takes
no more. A command ends, as any tool does whose reader is gone. A run goes on without: its records are in its folder.
Standard library alone, for Python 3.9 and later: a batch host has no more than that. Leaves out the signals that end
ranks (`runtime/rank_signals.py`).
"""

from __future__ import annotations

import io
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

_asked_to_save = False
_goes_on = False
"""Without whoever reads its standard output."""
_said_so = False


def command(main: Callable[[], int | None]) -> int:
    """Calls `main` as this process's program; the exit code. Ctrl-C is one line, wherever it comes."""
    begin()
    try:
        os.getcwd()
    except OSError as error:
        print(f"papo: error: the working folder: {error.strerror}", file=sys.stderr)
        return 2
    try:
        return main() or 0
    except KeyboardInterrupt:
        print("papo: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    finally:
        sys.stdout.flush()  # here, where its failure has a line of its own


def begin() -> None:
    """Makes streams and signals what the rest relies on; a second call changes nothing."""
    signal.signal(signal.SIGUSR1, remember)
    if not _goes_on:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else nobody can wait for a child
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in range(3):
        _open(number)
    sys.stdout = sys.__stdout__ = _stream(sys.stdout, 1)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = _stream(sys.stderr, 2)  # type: ignore[misc]


@contextmanager
def interrupted_at_once() -> Iterator[None]:
    """Around slow imports, before there is anything to clean up: an exception in the midst of one may be lost."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # ignored, or somebody else's
        yield
        return
    signal.signal(signal.SIGINT, _end_at_once)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end_at_once(number: int, frame: object) -> None:
    with suppress(OSError):
        os.write(2, b"papo: interrupted\n")
    os._exit(128 + number)


def go_on_without_readers() -> None:
    """From now on, in this process and those that it forks, what a standard stream does not take is dropped."""
    global _goes_on
    _goes_on = True
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)


@contextmanager
def save_requests_blocked() -> Iterator[None]:
    """SIGUSR1 waits within. A process that is started meanwhile never gets it, unless it calls `begin`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def remember(*_: object) -> None:
    """The handler of SIGUSR1 as long as nobody can save."""
    global _asked_to_save
    _asked_to_save = True


def save_requested() -> bool:
    """Whether SIGUSR1 has come so far; a forked process knows it too."""
    return _asked_to_save


class _Output(io.FileIO):
    """The descriptor under a standard stream. Writes all it is given, also to one that somebody set not to block."""

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        try:
            while rest:
                written: int | None = super().write(rest)
                if written is None:
                    select.select([], [self], [])
                else:
                    rest = rest[written:]
        except OSError as error:
            _not_taken(self.fileno(), error)
        return memoryview(data).nbytes


def _not_taken(number: int, error: OSError) -> None:
    """One line for standard output, once; nothing for standard error, where the line would stand."""
    global _said_so
    if number == 2 or _said_so:
        return
    _said_so = True
    level, rest = ("warning", "; the run goes on without it, and says so once") if _goes_on else ("error", "")
    with suppress(OSError):
        os.write(2, f"papo: {level}: standard output: {error.strerror}{rest}\n".encode())
    if not _goes_on:
        raise SystemExit(1)


def _open(number: int) -> None:
    """A closed descriptor: the next file that is opened would become a standard stream."""
    try:
        os.fstat(number)
    except OSError:
        os.open(os.devnull, os.O_RDWR)  # the lowest that is free


def _stream(given: Any, number: int) -> Any:
    """`given` over an `_Output`; a character that its encoding lacks is written as its escape. One that is not this
    process's own stream, as within a test, stays as it is."""
    encoding, at_once, by_line = "utf-8", False, number == 2
    if given is not None:
        raw = getattr(given.buffer, "raw", given.buffer) if type(given) is io.TextIOWrapper else None
        if not isinstance(raw, io.FileIO) or isinstance(raw, _Output) or raw.fileno() != number:
            return given
        encoding, at_once, by_line = given.encoding, given.write_through, given.line_buffering
        with suppress(OSError):
            given.flush()
    file = _Output(number, "w", closefd=False)
    buffer: Any = file if at_once else io.BufferedWriter(file)
    return io.TextIOWrapper(buffer, encoding, "backslashreplace", line_buffering=by_line, write_through=at_once)
