"""Time as long as this process runs: a job that was suspended, or stopped by Ctrl-Z, has missed no deadline meanwhile.

The system's clocks run on while a process is stopped. Standard library alone, as who watches a cluster job needs it.
"""

from __future__ import annotations

import time


class AwakeClock:
    """To be asked again and again: of a gap between two questions of more than `longest_gap_s`, so much counts."""

    def __init__(self, longest_gap_s: float):
        self._longest_gap_s = longest_gap_s
        self._asked, self._awake = time.monotonic(), 0.0

    def seconds(self) -> float:
        """Since this was made."""
        now = time.monotonic()
        self._awake += min(now - self._asked, self._longest_gap_s)
        self._asked = now
        return self._awake
