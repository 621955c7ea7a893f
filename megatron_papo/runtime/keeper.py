"""A small process beside the launcher of local ranks: when the launcher is killed, it ends what ranks have started.

The kernel ends a rank when its launcher ends, but not the processes that the rank has started (workers of a reward
function, of a library). These are in the rank's process group; the keeper, which the kernel notifies of the launcher's
end, ends them. Leaves out processes that have made a process group of their own.
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
    """A context whose value is a function; call it with the process ID of every group's leader. Enter it before any
    thread starts, since it forks."""
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
    """The program of the keeper's process."""
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
