"""The sections `loss` and `entropy`: the terms of the loss, their coefficients and how tokens are averaged."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_papo.config.basics import Fraction, NonNegative, Positive, Section


class EntropyConfig(Section):
    kind: Literal["sampled", "full"] = "sampled"
    """How entropy is estimated: `sampled`, the negative log-prob of the sampled tokens; `full`, over the whole
    vocabulary, with its gradient."""


class LossConfig(Section):
    policy_loss: Literal["clipped"] = "clipped"
    """The policy term: `clipped`, the clipped ratio of PPO and GRPO, with a dual clip."""
    clip_low: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """Clip range below, epsilon_low of the paper: the ratio is clipped at 1 - this."""
    clip_high: Positive = 0.3
    """Clip range above, epsilon_high of the paper: the ratio is clipped at 1 + this."""
    dual_clip: Annotated[float, Field(gt=1.0)] | None = 3.0
    """Bound c of the dual clip: for a negative advantage the loss is at most -c times the advantage; null: no bound."""
    averaging: Literal["token", "sequence", "fixed"] = "token"
    """How the tokens' losses become one: the mean over all tokens, the mean over sequences of their token means, or the
    sum divided by fixed_denominator."""
    fixed_denominator: Positive | None = None
    """Number of tokens that `averaging: fixed` divides by, e.g. global batch x generation.max_response_tokens."""
    perception_coef: NonNegative = 0.02
    """Weight of the perception KL (gamma in the paper), which is maximised."""
    reference_coef: NonNegative = 0.01
    """Weight of the KL to the reference policy (beta in the paper); 0: no reference policy is kept."""
    entropy_coef: NonNegative = 0.0
    """Weight of the entropy with the image (eta 1 in the paper), which is minimised."""
    masked_entropy_coef: NonNegative = 0.0
    """Weight of the entropy with the image masked (eta 2 in the paper), which is minimised."""
    old_logprobs: Literal["recomputed", "rollout"] = "recomputed"
    """Log-probs in the denominator of the ratio: those that the trainer computes from the weights before the updates,
    or those that the engine gave as it sampled."""
    correction: Literal["none", "truncated", "masked"] = "none"
    """Importance sampling for the difference between the engine's log-probs and the recomputed ones. truncated: the
    policy term is multiplied by their ratio, at most correction_cap; masked: it is multiplied by the ratio, and is zero
    where the ratio is not between correction_floor and correction_cap."""
    correction_level: Literal["token", "sequence"] = "token"
    """Whether that ratio is taken for each token, or for a whole response as the geometric mean over its tokens."""
    correction_cap: Annotated[float, Field(ge=1.0)] = 2.0
    """Largest ratio of the correction."""
    correction_floor: Fraction = 0.5
    """Smallest ratio that `correction: masked` keeps."""

    @model_validator(mode="after")
    def _check(self) -> LossConfig:
        if (self.averaging == "fixed") != (self.fixed_denominator is not None):
            raise ValueError("loss.averaging=fixed and loss.fixed_denominator go together")
        if self.correction != "none" and self.old_logprobs == "rollout":
            raise ValueError("loss.correction needs loss.old_logprobs=recomputed: it corrects for the engine's")
        return self
