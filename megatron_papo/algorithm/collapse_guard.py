"""The guard against collapse of the perception term: it says when to lower the coefficient, and when to stop.

With too large a coefficient the policy earns KL by emitting unrelated tokens (arXiv 2507.06448, "loss hacking"). Three
of the signs that come before reward falls are watched: the perception KL climbs, the share of clipped tokens climbs (of
advantages of either sign, as in the published curves), the entropy under the masked image climbs. Left out are the
variance of the KL and the dip of the entropy, which are logged.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from megatron_papo.config import GuardConfig
from megatron_papo.types import Metrics


@dataclass(frozen=True)
class GuardDecision:
    """What to do after a step."""

    action: Literal["none", "lower", "stop"]
    reason: str
    """The signs that are over their limits, with their values; empty where none is."""


@dataclass(frozen=True)
class CollapseGuard:
    """Acts once any sign has been over its limit for `patience` steps in a row. It is a frozen value: observing a step
    returns the next guard."""

    config: GuardConfig
    strikes: int = 0
    """Steps in a row with a sign over its limit."""
    factor: float = 1.0
    """Multiplies the perception coefficient."""

    def observe_step(self, metrics: Metrics) -> tuple[CollapseGuard, GuardDecision]:
        """`observe` with the token means of a step's metrics."""
        means = {name: total / count for name, (total, count) in metrics.items() if count}
        return self.observe(
            perception_kl=means.get("perception_kl"),
            clip_fraction=means.get("clip_fraction"),
            masked_entropy=means.get("masked_entropy"),
        )

    def observe(
        self, *, perception_kl: float | None, clip_fraction: float | None, masked_entropy: float | None
    ) -> tuple[CollapseGuard, GuardDecision]:
        """The next guard and what to do, from the token means of one step: None where the step had no such tokens. NaN
        counts as over the limit."""
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
        """What a checkpoint keeps of the guard, as plain JSON."""
        return {"strikes": self.strikes, "factor": self.factor}

    @classmethod
    def from_state(cls, config: GuardConfig, state: dict[str, Any]) -> CollapseGuard:
        """The guard that a checkpoint keeps, with the limits of `config`."""
        return cls(config, strikes=int(state["strikes"]), factor=float(state["factor"]))


def _is_over(value: float | None, limit: float) -> bool:
    return value is not None and not value <= limit
