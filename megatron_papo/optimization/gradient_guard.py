"""Which updates are not made: those that something not finite went into, or whose gradient stands out. Pure.

A gradient norm is what a broken micro-batch, an overflow in FP8 or a bad rollout shows in first. How large the loss is
says nothing: the policy term's value hovers about zero whatever happens. That it is a number has to be asked for
itself: where a NaN meets the clipping of the ratio, its gradient is a finite zero. A log-prob that an engine reports is
of a token that it sampled, so it is finite unless the engine's numbers are broken, and so are its tokens then, whether
or not the loss reads the log-probs.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

from megatron_papo.config import OptimConfig
from megatron_papo.types import Metrics

_REMEMBERED = 32
_FEWEST = 8
"""Norms before any is called a spike."""
_SOURCES = {
    "policy_logprobs": "the policy's log-probs",
    "ratio": "the old policy's log-probs (with loss.old_logprobs=rollout the engine's)",
    "rollout_gap": "the engine's log-probs",
    "ref_kl": "the reference's log-probs",
    "perception_kl": "the log-probs under the masked image",
    "loss/total": "the loss",
}
"""Metric -> what is to blame when it is the first that is not finite: later ones follow from what is named earlier."""


def fault_of(metrics: Metrics) -> str:
    """What of an update's metrics is not finite, by its source; empty when all are."""
    found = (what for name, what in _SOURCES.items() if not math.isfinite(metrics.get(name, (0.0, 0.0))[0]))
    what = next(found, "")
    return f"{what} {'is' if what == 'the loss' else 'are'} not finite" if what else ""


class UpdateGuard:
    """Watches the gradient norms of a run; `skips` moves it on."""

    def __init__(self, config: OptimConfig):
        self._config = config
        self._norms: deque[float] = deque(maxlen=_REMEMBERED)
        self._in_a_row = 0
        self._last = ""
        self._new: list[str] = []

    def skips(self, norm: float, fault: str = "") -> bool:
        """Whether the update with this gradient norm is left out, with a `fault` always; norms of those left out are
        not remembered."""
        factor = self._config.spike_factor
        if fault:
            self._last = fault
        elif not math.isfinite(norm):
            self._last = f"the gradient norm is {norm}"
        elif factor and len(self._norms) >= _FEWEST and norm > factor * statistics.median(self._norms):
            self._last = f"the gradient norm is {norm:.4g}, the median before it {statistics.median(self._norms):.4g}"
        else:
            self._norms.append(norm)
            self._in_a_row = 0
            return False
        self._in_a_row += 1
        self._new.append(self._last)
        return True

    def take_skipped(self) -> list[str]:
        """Why each update that was left out since this was last asked was."""
        new, self._new = self._new, []
        return new

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
