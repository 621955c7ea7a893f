"""The guard of updates: skips those with a value that is not finite, and those whose gradient norm stands out. Pure.

A broken micro-batch, an overflow in FP8 or a bad rollout shows first in the gradient norm. The size of the loss says
nothing, since the policy term stays near zero whatever happens. But whether the loss is finite must be checked as well:
where a NaN meets the clipping of the ratio, its gradient is a finite zero. The engine's log-probs are checked even when
the loss does not read them: they belong to tokens that the engine sampled, so where one is not finite the engine's
computation is broken, and its tokens are not to be trusted either.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

from megatron_papo.config import OptimConfig
from megatron_papo.types import Metrics

_NUM_REMEMBERED = 32
"""How many norms of past updates the median is taken over."""
_FEWEST_NORMS = 8
"""How many norms are needed before one can be called a spike."""
_SOURCES = {
    "policy_logprobs": "the policy's log-probs",
    "ratio": "the old policy's log-probs (with loss.old_logprobs=rollout the engine's)",
    "rollout_gap": "the engine's log-probs",
    "ref_kl": "the reference's log-probs",
    "perception_kl": "the log-probs under the masked image",
    "loss/total": "the loss",
}
"""Metric -> what is to blame where it is the first that is not finite; later ones depend on earlier ones."""


def fault_of(metrics: Metrics) -> str:
    """A sentence that names the source of the first metric of an update that is not finite; empty where all are."""
    sources = (source for name, source in _SOURCES.items() if not math.isfinite(metrics.get(name, (0.0, 0.0))[0]))
    source = next(sources, "")
    return f"{source} {'is' if source == 'the loss' else 'are'} not finite" if source else ""


class UpdateGuard:
    """Remembers the gradient norms of a run and decides which updates are skipped; the same on every rank."""

    def __init__(self, config: OptimConfig):
        self._config = config
        self._norms: deque[float] = deque(maxlen=_NUM_REMEMBERED)
        self._in_a_row = 0
        self._last_reason = ""
        self._new_reasons: list[str] = []

    def skips(self, norm: float, fault: str = "") -> bool:
        """Whether the update with this gradient norm is skipped; with a `fault` (of `fault_of`) it always is. Norms of
        skipped updates are not remembered."""
        factor, num_norms = self._config.spike_factor, len(self._norms)
        if fault:
            self._last_reason = fault
        elif not math.isfinite(norm):
            self._last_reason = f"the gradient norm is {norm}"
        elif factor and num_norms >= _FEWEST_NORMS and norm > factor * (median := statistics.median(self._norms)):
            self._last_reason = f"the gradient norm is {norm:.4g}, the median before it {median:.4g}"
        else:
            self._norms.append(norm)
            self._in_a_row = 0
            return False
        self._in_a_row += 1
        self._new_reasons.append(self._last_reason)
        return True

    def take_skipped(self) -> list[str]:
        """One reason for each update that was skipped since the last call."""
        reasons, self._new_reasons = self._new_reasons, []
        return reasons

    @property
    def reason_to_stop(self) -> str:
        """Why the run should end: too many updates in a row were skipped. Empty while it may go on."""
        if self._in_a_row < self._config.max_skipped:
            return ""
        return f"optim.max_skipped: {self._in_a_row} updates in a row were skipped; {self._last_reason}"

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the guard, as plain JSON."""
        return {"norms": list(self._norms), "in_a_row": self._in_a_row}

    def load(self, state: dict[str, Any]) -> None:
        """Takes over what a checkpoint keeps; it keeps nothing where it was written before there was this guard."""
        self._norms = deque(state.get("norms", ()), maxlen=_NUM_REMEMBERED)
        self._in_a_row = state.get("in_a_row", 0)
