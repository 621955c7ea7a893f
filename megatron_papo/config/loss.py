"""The sections `loss` and `entropy`: the terms of the objective and their coefficients."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_papo.config.basics import Fraction, NonNegative, Positive, Section


class EntropyConfig(Section):
    kind: Literal["sampled", "full"] = "sampled"
    """-log-prob of the sampled tokens, or over the whole vocabulary with its gradient."""


class LossConfig(Section):
    policy_loss: Literal["clipped"] = "clipped"
    """The policy term: `clipped`, the clipped ratio of PPO and GRPO, with a dual clip."""
    clip_low: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """epsilon below: the ratio is clipped at 1 - this."""
    clip_high: Positive = 0.3
    """epsilon above: the ratio is clipped at 1 + this."""
    dual_clip: Annotated[float, Field(gt=1.0)] | None = 3.0
    """c: for negative advantages the loss is at most -c times the advantage; null: no bound."""
    averaging: Literal["token", "sequence", "fixed"] = "token"
    """Mean over the tokens, over the sequences of token means, or a sum over a fixed number."""
    fixed_denominator: Positive | None = None
    """Tokens that `averaging: fixed` divides by, e.g. global batch x generation.max_response_tokens."""
    perception_coef: NonNegative = 0.02
    """gamma: weight of the perception KL, which is maximised."""
    reference_coef: NonNegative = 0.01
    """beta: weight of the KL to the reference policy; 0: no reference is kept."""
    entropy_coef: NonNegative = 0.0
    """eta 1: weight of the entropy with the image, which is minimised."""
    masked_entropy_coef: NonNegative = 0.0
    """eta 2: weight of the entropy with the image masked, which is minimised."""
    old_logprobs: Literal["recomputed", "rollout"] = "recomputed"
    """What the ratio is taken against: the trainer's own log-probs of the weights before the updates, or the engine's
    as it sampled."""
    correction: Literal["none", "truncated", "masked"] = "none"
    """Importance sampling for what the engine's log-probs differ from the recomputed ones: the policy term times their
    ratio, cut at correction_cap; or times the ratio, and zero where it lies outside correction_floor to the cap."""
    correction_level: Literal["token", "sequence"] = "token"
    """Whether that ratio is a token's, or a whole response's: the geometric mean of its tokens'."""
    correction_cap: Annotated[float, Field(ge=1.0)] = 2.0
    """Largest ratio."""
    correction_floor: Fraction = 0.5
    """Smallest ratio of `masked`."""

    @model_validator(mode="after")
    def _check(self) -> LossConfig:
        if (self.averaging == "fixed") != (self.fixed_denominator is not None):
            raise ValueError("loss.averaging=fixed and loss.fixed_denominator go together")
        if self.correction != "none" and self.old_logprobs == "rollout":
            raise ValueError("loss.correction needs loss.old_logprobs=recomputed: it corrects for the engine's")
        return self
