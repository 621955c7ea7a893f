"""A clock that stops while this process is stopped: a suspended job, or one stopped by Ctrl-Z, misses no deadline.

The system's clocks go on meanwhile. Imports the standard library only, as the supervisor of a cluster job needs it.
"""

from __future__ import annotations

import time


class AwakeClock:
    """Must be read regularly: if two readings are more than `longest_gap_s` apart, only that many seconds count."""

    def __init__(self, longest_gap_s: float):
        self._longest_gap_s = longest_gap_s
        self._asked, self._awake = time.monotonic(), 0.0

    def seconds(self) -> float:
        """Seconds since this clock was made."""
        now = time.monotonic()
        self._awake += min(now - self._asked, self._longest_gap_s)
        self._asked = now
        return self._awake
