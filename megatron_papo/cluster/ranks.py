"""Which rank of a cluster job is dead, from the signs of life that ranks write (observe/heartbeat.py).

A sign's age is counted from when it was last seen to change, by the watcher's own clock. Standard library alone.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from megatron_papo.observe.failures import Failure


class RankWatch:
    """Looks at RUN/heartbeats; `limit_s` since the last sign, or `start_limit_s` without a first one, is death."""

    def __init__(self, run_dir: Path, num_ranks: int, limit_s: float, start_limit_s: float):
        self._folder, self._num_ranks = run_dir / "heartbeats", num_ranks
        self._limit_s, self._start_limit_s = limit_s, start_limit_s
        self._began = time.monotonic()
        self._signs: dict[int, dict[str, object]] = {}
        self._changed: dict[int, float] = {}

    def dead_rank(self) -> Failure | None:
        """The one that has been silent for longest, beyond its limit. A rank whose file is gone has ended well."""
        now = time.monotonic()
        present = self._look(now)
        silent = {rank: now - self._changed[rank] for rank in present}
        for rank in range(self._num_ranks):
            if rank not in self._changed and now - self._began > self._start_limit_s:
                return _dead(rank, f"gave no sign of life for {self._start_limit_s:g} s after the start")
        for rank, seconds in sorted(silent.items(), key=lambda item: -item[1])[:1]:
            if seconds > self._limit_s:
                sign = self._signs[rank]
                stage = f"stage {sign['stage']}" if sign["stage"] else "between stages"
                return _dead(rank, f"no sign of life from {sign['host']} for {seconds:.0f} s ({stage})")
        return None

    def _look(self, now: float) -> list[int]:
        found = []
        for path in self._folder.glob("rank_*.json"):
            try:
                sign = json.loads(path.read_text())
            except (OSError, ValueError):  # just gone, or a disk that hiccups
                continue
            rank = int(path.stem.removeprefix("rank_"))
            found.append(rank)
            if self._signs.get(rank) != sign:
                self._signs[rank], self._changed[rank] = sign, now
        return found


def _dead(rank: int, message: str) -> Failure:
    return Failure(rank, time.time(), "killed", "dead", message)
