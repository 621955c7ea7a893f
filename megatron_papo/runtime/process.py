"""What a program of the project does first: it puts the streams and signals that it inherits into a known state.

    sys.exit(command(main))      at the end of a program

Standard streams may be closed, or break later; signals may be ignored or blocked; the working folder may be gone.
SIGUSR1, by which a cluster job requests a save, would end a process that does not expect it: it is remembered from here
on, and the run acts on it when it can (`runtime/stop_signal.py`). When standard output can no longer be written to, a
command ends, as any tool does whose reader is gone; a run goes on without it, since its records are in its folder.
Imports the standard library only, for Python 3.9 and later: a batch host has no more. Leaves out the signals that end
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
"""Whether this process goes on when its standard output can no longer be written to."""
_said_so = False


def command(main: Callable[[], int | None]) -> int:
    """Calls `main` as this process's program. Returns the exit code. Ctrl-C prints one line, whenever it comes."""
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
    """Puts streams and signals into the state that all other code relies on; a second call changes nothing."""
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
    """A context for slow imports, in which Ctrl-C ends the process at once: during an import its exception may be lost,
    and nothing is there yet that needs a clean-up."""
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
    """From now on, in this process and those that it forks, output that a standard stream does not take is dropped."""
    global _goes_on
    _goes_on = True
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)


@contextmanager
def save_requests_blocked() -> Iterator[None]:
    """A context in which SIGUSR1 is blocked. A process that is started in it never gets SIGUSR1, unless it calls
    `begin`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def remember(*_: object) -> None:
    """The handler of SIGUSR1 before the run is able to save."""
    global _asked_to_save
    _asked_to_save = True


def save_requested() -> bool:
    """Whether SIGUSR1 has come so far; a forked process knows it too."""
    return _asked_to_save


class _Output(io.FileIO):
    """The file under a standard stream. It writes everything, also if another process made the descriptor
    non-blocking."""

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
    """Reports once that standard output cannot be written to. Standard error gets no report: the line would go
    there."""
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
    """Opens /dev/null on a closed descriptor: else the next file that is opened would become a standard stream."""
    try:
        os.fstat(number)
    except OSError:
        os.open(os.devnull, os.O_RDWR)  # the lowest that is free


def _stream(given: Any, number: int) -> Any:
    """`given` over an `_Output`; a character that its encoding lacks is written as its escape. A stream that
    is not this process's own, as in a test, stays as it is."""
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
