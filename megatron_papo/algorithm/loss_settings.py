"""The settings that the objective reads at one optimizer step: coefficients after schedule and guard."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_papo.config import Config, EntropyConfig, LossConfig, PerceptionConfig


@dataclass(frozen=True)
class LossSettings:
    """What `losses.papo_loss` needs to know of one optimizer step."""

    loss: LossConfig
    perception: PerceptionConfig
    entropy: EntropyConfig
    perception_coef: float
    """gamma at this step: after its schedule and the guard."""
    entropy_coef: float
    """eta 1 at this step: after the schedule."""
    masked_entropy_coef: float
    """eta 2 at this step: after the schedule."""
    first_update: bool = True
    """Whether the policy is still the one that the rollout batch began with."""

    @classmethod
    def at_step(cls, config: Config, step: int, guard_factor: float = 1.0) -> LossSettings:
        """The settings of the first update of `step` (from 0).

        `guard_factor` lowers gamma alone. The entropy terms counter the collapse that the guard watches for, so
        lowering them with gamma would weaken them just when they are needed.
        """
        loss, gamma, share = config.loss, perception_coef(config, step), schedule_share(config, step)
        return cls(
            loss,
            config.perception,
            config.entropy,
            perception_coef=gamma * guard_factor,
            entropy_coef=loss.entropy_coef * share,
            masked_entropy_coef=loss.masked_entropy_coef * share,
        )


def perception_coef(config: Config, step: int) -> float:
    """gamma at `step` (from 0), before the guard: linear from loss.perception_coef to perception.coef_end over
    perception.coef_steps, and constant afterwards; always loss.perception_coef where there is no schedule."""
    start, end, steps = config.loss.perception_coef, config.perception.coef_end, config.perception.coef_steps
    if end is None or steps is None:
        return start
    return start + (end - start) * min(step / steps, 1.0)


def schedule_share(config: Config, step: int) -> float:
    """The factor by which the schedule of gamma changes both entropy coefficients at `step`; 1 without a schedule.

    It is gamma as a share of the larger of the schedule's two ends, so that a schedule that rises from 0 brings the
    coefficients up to what the settings say.
    """
    highest = max(config.loss.perception_coef, config.perception.coef_end or 0.0)
    return perception_coef(config, step) / highest if highest > 0 else 1.0
