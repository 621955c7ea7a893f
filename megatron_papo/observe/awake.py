"""Time as long as this process runs: a job that was suspended, or stopped by Ctrl-Z, has missed no deadline meanwhile.

The system's clocks run on while a process is stopped. Standard library alone, as who watches a cluster job needs it.
"""

from __future__ import annotations

import time

_LONGEST_GAP_S = 5.0


class AwakeClock:
    """To be asked every second or so: of a longer gap between two questions, in which this process did not come to ask,
    five seconds count."""

    def __init__(self) -> None:
        self._asked, self._awake = time.monotonic(), 0.0

    def seconds(self) -> float:
        """Since this was made."""
        now = time.monotonic()
        self._awake += min(now - self._asked, _LONGEST_GAP_S)
        self._asked = now
        return self._awake
