"""Which updates are not made: those whose gradient is not finite, or stands out from those before. Pure.

A gradient norm is what a broken micro-batch, an overflow in FP8 or a bad rollout shows in first. The loss itself is no
measure: the policy term's value hovers about zero whatever happens.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

from megatron_papo.config import OptimConfig

_REMEMBERED = 32
_FEWEST = 8
"""Norms before any is called a spike."""


class UpdateGuard:
    """Watches the gradient norms of a run; `skips` moves it on."""

    def __init__(self, config: OptimConfig):
        self._config = config
        self._norms: deque[float] = deque(maxlen=_REMEMBERED)
        self._in_a_row = 0
        self._last = ""

    def skips(self, norm: float) -> bool:
        """Whether the update with this gradient norm is left out; norms of those left out are not remembered."""
        factor = self._config.spike_factor
        if not math.isfinite(norm):
            self._last = f"the gradient norm is {norm}"
        elif factor and len(self._norms) >= _FEWEST and norm > factor * statistics.median(self._norms):
            self._last = f"the gradient norm is {norm:.4g}, the median before it {statistics.median(self._norms):.4g}"
        else:
            self._norms.append(norm)
            self._in_a_row = 0
            return False
        self._in_a_row += 1
        return True

    @property
    def reason_to_stop(self) -> str:
        """Why the run should end; empty while it may go on."""
        if self._in_a_row < self._config.max_skipped:
            return ""
        return f"optim.max_skipped: {self._in_a_row} updates in a row were skipped; {self._last}"

    def state(self) -> dict[str, Any]:
        return {"norms": list(self._norms), "in_a_row": self._in_a_row}

    def load(self, state: dict[str, Any]) -> None:
        """Of a checkpoint; an empty one is of a version without guard."""
        self._norms = deque(state.get("norms", ()), maxlen=_REMEMBERED)
        self._in_a_row = state.get("in_a_row", 0)
