"""Kills at moments of chance, and damages of files: what `tests/system/test_chaos.py` does to runs.

A seed decides everything but how fast the machine is, so that the same seed aims at the same moments and bytes.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.support.commands import Command

Kill = Callable[[Command, random.Random], None]

_END_S = 20.0
"""That what a killed command had started takes to end, on a busy machine."""


@dataclass(frozen=True)
class Damage:
    name: str
    do: Callable[[Path, random.Random], None]


def _truncate(file: Path, moments: random.Random) -> None:
    os.truncate(file, moments.randrange(1, max(2, file.stat().st_size)))


def _flip(file: Path, moments: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[moments.randrange(len(content))] ^= 1 << moments.randrange(8)
    file.write_bytes(content)


def _delete(file: Path, moments: random.Random) -> None:
    file.unlink()


def _empty(file: Path, moments: random.Random) -> None:
    os.truncate(file, 0)


DAMAGES = (
    Damage("truncated", _truncate),
    Damage("flipped", _flip),
    Damage("deleted", _delete),
    Damage("emptied", _empty),
)


def session_of(command: Command) -> list[psutil.Process]:
    """Every live process of the command's session: the launcher, its ranks, their engines and workers."""
    members = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == command.pid and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return members


def kill_everything(command: Command, moments: random.Random) -> None:
    """Kills all processes at once, as when a node loses power."""
    for process in session_of(command):
        _kill(process)


def kill_the_launcher(command: Command, moments: random.Random) -> None:
    """What it had started ends by itself."""
    os.kill(command.pid, signal.SIGKILL)


def kill_one_process(command: Command, moments: random.Random) -> None:
    """Kills one process, which may be the launcher, as the kernel does when memory runs out."""
    processes = session_of(command)
    if processes:
        _kill(moments.choice(processes))


KILLS = (kill_everything, kill_the_launcher, kill_one_process)


def killed_at(command: Command, after_s: float, kill: Kill, moments: random.Random) -> bool:
    """Kills the command after so many seconds, unless it ended before; whether it was killed.

    Fails when anything of it is left after a while.
    """
    deadline = time.monotonic() + after_s
    while command.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    killed = command.poll() is None
    if killed:
        kill(command, moments)
    deadline = time.monotonic() + _END_S
    while (left := session_of(command)) and time.monotonic() < deadline:
        if kill is kill_one_process and command.poll() is None:
            deadline = time.monotonic() + _END_S  # a worker of rewards or data may be replaced, and the run go on
        time.sleep(0.02)
    assert not left, f"{kill.__name__}: outlived by {[_shown(process) for process in left]}"
    command.wait(timeout=_END_S)
    return killed


def _shown(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess):
        parents = [str(parent.pid) for parent in process.parents()]
        return f"{process.pid} {' '.join(process.cmdline())[-200:]} ({process.status()}, of {', '.join(parents)})"
    return f"{process.pid}, gone"


def _kill(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        process.kill()
