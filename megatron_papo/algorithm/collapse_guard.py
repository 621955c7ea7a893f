"""Watches the signs that the perception term is being hacked, and says when to lower its coefficient or to stop.

Too large a coefficient lets the policy earn KL by unrelated tokens (arXiv 2507.06448, "loss hacking"). Of the signs
known to come before reward falls, three are watched: the perception KL climbs, the share of clipped tokens climbs (of
advantages of either sign, as in the published curves), the entropy under the masked image climbs. Left out: the
variance of the KL and the dip of the entropy, which are logged.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from megatron_papo.config import GuardConfig


@dataclass(frozen=True)
class GuardDecision:
    action: Literal["none", "lower", "stop"]
    reason: str
    """The signs over their limits, with values; empty while there are none."""


@dataclass(frozen=True)
class CollapseGuard:
    """Watches for collapse of the perception term: any sign over its limit, `patience` steps in a row, acts.

    A value: `observe` returns the next guard. `factor` multiplies the perception coefficient.
    """

    config: GuardConfig
    strikes: int = 0
    factor: float = 1.0

    def observe(
        self, *, perception_kl: float | None, clip_fraction: float | None, masked_entropy: float | None
    ) -> tuple[CollapseGuard, GuardDecision]:
        """Token means of one step, None for what the step had no tokens for; NaN counts as over the limit."""
        if self.config.action == "off":
            return self, GuardDecision("none", "")
        limits = self.config
        signs = (
            ("perception_kl", perception_kl, limits.perception_kl),
            ("clip_fraction", clip_fraction, limits.clip_fraction),
            ("masked_entropy", masked_entropy, limits.masked_entropy),
        )
        over = [f"{name} {value:.4g} > {limit:g}" for name, value, limit in signs if _is_over(value, limit)]
        reason, strikes = ", ".join(over), self.strikes + 1 if over else 0
        if strikes < self.config.patience:
            return replace(self, strikes=strikes), GuardDecision("none", reason)
        reason = f"{reason}, {strikes} steps in a row"
        factor = self.factor * self.config.factor if self.config.action == "lower" else self.factor
        return replace(self, strikes=0, factor=factor), GuardDecision(self.config.action, reason)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        return {"strikes": self.strikes, "factor": self.factor}

    @classmethod
    def from_state(cls, config: GuardConfig, state: dict[str, Any]) -> CollapseGuard:
        return cls(config, strikes=int(state["strikes"]), factor=float(state["factor"]))


def _is_over(value: float | None, limit: float) -> bool:
    return value is not None and not value <= limit
