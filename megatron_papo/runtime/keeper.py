"""A small process beside the launcher of local ranks: when the launcher is killed, it ends what ranks have started.

A rank itself ends with its launcher, by the kernel. What it had started (workers of a reward function, of a library)
would not, and lives in the rank's process group; the keeper, which the kernel tells of the launcher's end, ends those.
Leaves out what a process takes along into a group of its own.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

_PR_SET_PDEATHSIG = 1
_TOLD_BY = signal.SIGHUP


@contextmanager
def kept_groups() -> Iterator[Callable[[int], None]]:
    """What it gives is called with the process ID of every leader of a group. To be entered before any thread starts:
    it forks."""
    reads, writes = os.pipe()
    parent = os.getpid()
    keeper = os.fork()
    if not keeper:
        _keep(parent, reads)
    os.close(reads)
    try:
        yield lambda leader: _tell(writes, leader)
    finally:
        os.close(writes)
        with suppress(OSError):
            os.kill(keeper, signal.SIGKILL)
            os.waitpid(keeper, 0)


def _tell(descriptor: int, leader: int) -> None:
    os.write(descriptor, b"%d\n" % leader)


def _keep(parent: int, reads: int) -> None:
    """The whole process."""
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, [_TOLD_BY])
        os.setsid()  # out of reach of a terminal, and of what ends the launcher's group
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, _TOLD_BY)
        while os.getppid() == parent:
            signal.sigwait([_TOLD_BY])
        os.set_blocking(reads, False)
        with suppress(BlockingIOError):
            for leader in os.read(reads, 1 << 16).split():
                with suppress(OSError):
                    os.killpg(int(leader), signal.SIGKILL)
    finally:
        os._exit(0)
