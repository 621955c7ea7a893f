"""Which rank of a cluster job is dead: from the signs of life that ranks write (runtime/heartbeat.py), or srun's words.

A sign's age is counted from when it was last seen to change, by the watcher's own clock, without the time for which the
watcher itself was stopped: a job that was suspended is alive. Imports the standard library only.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_papo.cluster.attempts import OUT_OF_MEMORY
from megatron_papo.files.small_files import read_object
from megatron_papo.runtime.awake_clock import AwakeClock
from megatron_papo.runtime.failures import Failure
from megatron_papo.runtime.hostlist import hosts

_TASK = re.compile(r"error: (\S+): tasks? ([\d,\-]+): (.*)")
_NODE_INDEX = re.compile(r"error: .*missing step on node (\d+)")
_NODE_NAME = re.compile(r"error: Node failure on (\S+)")
_ENDED_BY_SRUN = ("Terminating StepId", "Job step aborted", "forcing job termination")
"""From such a line on, tasks die because srun ends them."""
_LONGEST_GAP_S = 10.0
"""Seconds between two looks, which are a second apart and more where Slurm or the disk takes its time."""


class RankWatch:
    """Watches RUN/heartbeats: a rank is dead `limit_s` after its last sign, or `start_limit_s` after the start without
    one."""

    def __init__(self, run_dir: Path, num_ranks: int, limit_s: float, start_limit_s: float):
        self._folder, self._num_ranks = run_dir / "heartbeats", num_ranks
        self._limit_s, self._start_limit_s = limit_s, start_limit_s
        self._clock = AwakeClock(_LONGEST_GAP_S)
        self._signs: dict[int, dict[str, object]] = {}
        self._changed: dict[int, float] = {}

    @property
    def all_started(self) -> bool:
        """Whether every rank has given a sign of life."""
        return len(self._changed) == self._num_ranks

    def dead_rank(self, but: set[int]) -> Failure | None:
        """The dead rank that has been silent for longest, beyond its limit. A rank whose file is gone has ended well,
        and one in `but` has told why it ended."""
        now = self._clock.seconds()
        present = [rank for rank in self._look(now) if rank not in but]
        for rank in range(self._num_ranks):
            if rank not in self._changed and now > self._start_limit_s:
                return _dead(rank, f"gave no sign of life for {self._start_limit_s:g} s after the start")
        longest = min(present, key=lambda rank: self._changed[rank], default=None)
        if longest is None or now - self._changed[longest] <= self._limit_s:
            return None
        return self._silent(longest, now)

    def longest_silent(self, but: set[int]) -> Failure | None:
        """After the ranks have ended: the first to fall silent, of those not in `but`, who have told why they ended."""
        now = self._clock.seconds()
        others = [rank for rank in self._look(now) if rank not in but]
        return self._silent(min(others, key=lambda rank: self._changed[rank]), now) if others else None

    def rank_on(self, host: str) -> int:
        """The first rank of a node."""
        return min((rank for rank, sign in self._signs.items() if sign["host"] == host), default=0)

    def _silent(self, rank: int, now: float) -> Failure:
        sign = self._signs[rank]
        stage = f"stage {sign['stage']}" if sign["stage"] else "between stages"
        return _dead(rank, f"no sign of life from {sign['host']} for {now - self._changed[rank]:.0f} s ({stage})")

    def _files(self) -> list[Path]:
        """The ranks' files; none when the folder goes while it is read: ranks that end well take it away."""
        try:
            return list(self._folder.glob("rank_*.json"))
        except OSError:
            return []

    def _look(self, now: float) -> list[int]:
        ranks = []
        for path in self._files():
            try:
                sign, rank = read_object(path), int(path.stem.removeprefix("rank_"))
            except ValueError:  # just gone, or a disk that hiccups
                continue
            if not {"count", "host", "stage"} <= sign.keys():
                continue
            ranks.append(rank)
            if self._signs.get(rank) != sign:
                self._signs[rank], self._changed[rank] = sign, now
        return ranks


def _dead(rank: int, message: str) -> Failure:
    return Failure(rank, time.time(), "killed", "dead", message)


def killed_tasks(srun_log: Path, watch: RankWatch, nodelist: str) -> list[Failure]:
    """What srun says of ranks that left no note: a task killed, a node gone."""
    return list(_killed(srun_log, watch, nodelist)) if srun_log.exists() else []


def _killed(srun_log: Path, watch: RankWatch, nodelist: str) -> Iterator[Failure]:
    for line in srun_log.read_text(errors="replace").splitlines():
        if any(words in line for words in _ENDED_BY_SRUN):
            return
        if task := _TASK.search(line):
            rank, text = int(re.split(r"[,\-]", task[2])[0]), f"on {task[1]}: {task[3]}"
            if task[3] == "Exited with exit code 2":
                yield Failure(rank, time.time(), "config", "refused", text)
            elif task[3].startswith("Exited"):
                yield Failure(rank, time.time(), "silent", "ended", text)
            elif task[3] == "Out Of Memory":
                text += "; what helps is a larger cluster.memory, or more machines"
                yield Failure(rank, time.time(), "killed", OUT_OF_MEMORY, text)
            else:
                yield Failure(rank, time.time(), "killed", "killed", text)
        elif gone := _NODE_INDEX.search(line):
            yield _gone(list(hosts(nodelist))[int(gone[1])], watch)
        elif gone := _NODE_NAME.search(line):
            yield _gone(gone[1], watch)


def _gone(host: str, watch: RankWatch) -> Failure:
    return _dead(watch.rank_on(host), f"Slurm has lost its node {host}")
