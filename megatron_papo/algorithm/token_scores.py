"""What the terms of the objective are made of: log-probs, KLs and entropies of every response token of a row."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor

from megatron_papo.algorithm.estimators import kl_k3
from megatron_papo.algorithm.importance_weights import correction_weights
from megatron_papo.algorithm.loss_settings import LossSettings
from megatron_papo.types import HeadOutputs, MicroBatch


@dataclass(frozen=True)
class TokenScores:
    """One value a response token, [R] each, in nats; None where a model was not scored because nothing reads it."""

    policy_R: Tensor
    """Log-probs of the policy, with the gradient."""
    old_R: Tensor
    """Log-probs that the ratio is taken against."""
    entropy_R: Tensor
    """Entropy of the policy, as `entropy.kind` says."""
    trainer_R: Tensor | None = None
    """Log-probs of the old policy as the trainer computes them, which the engine's are compared with."""
    correction_R: Tensor | None = None
    """Importance weights between engine and trainer (`importance_weights.py`); a factor, not nats."""
    ref_kl_R: Tensor | None = None
    """KL to the reference policy."""
    masked_R: Tensor | None = None
    """Log-probs of the same tokens under the masked image; with the gradient where the masked branch is joint."""
    perception_kl_R: Tensor | None = None
    """KL between the policy with the image and with the image masked."""
    masked_entropy_R: Tensor | None = None
    """Entropy under the masked image."""

    def detached(self) -> TokenScores:
        """The same values as constants."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        constants: dict[str, Any] = {name: value.detach() for name, value in values.items() if value is not None}
        return TokenScores(**constants)


def token_scores(outputs: HeadOutputs, row: MicroBatch, settings: LossSettings) -> TokenScores:
    """The scores of a row's response tokens. Raises AssertionError where a term lacks the scores that it reads."""
    policy_R, loss = outputs.policy_logprobs_R, settings.loss
    assert loss.reference_coef == 0 or row.ref_logprobs_R is not None, "the reference was not scored"
    trainer_R = policy_R.detach() if settings.first_update else None
    trainer_R = trainer_R if row.old_logprobs_R is None else row.old_logprobs_R
    old_R = row.rollout_logprobs_R if loss.old_logprobs == "rollout" else trainer_R
    assert old_R is not None, "the old policy was not scored"
    scores = TokenScores(
        policy_R=policy_R,
        old_R=old_R,
        entropy_R=_entropy(settings.entropy.kind, policy_R, outputs.entropy_R, settings.entropy_coef),
        trainer_R=trainer_R,
        correction_R=None if trainer_R is None else correction_weights(trainer_R, row, loss),
        ref_kl_R=None if row.ref_logprobs_R is None else kl_k3(policy_R, row.ref_logprobs_R),
    )
    return _with_masked_view(scores, outputs, row, settings)


def _with_masked_view(
    scores: TokenScores, outputs: HeadOutputs, row: MicroBatch, settings: LossSettings
) -> TokenScores:
    """The scores with those of the masked view; as they are where no term reads it."""
    joint = settings.perception.masked_branch == "joint"
    masked_R = outputs.masked_logprobs_R if joint else row.masked_logprobs_R
    if masked_R is None:
        needed = settings.perception_coef > 0 or settings.masked_entropy_coef > 0
        assert not (needed and row.has_image_R.any()), "the masked view was not scored"
        if not needed:
            return scores
        masked_R = scores.policy_R.detach()  # without an image there is nothing to mask, and every weight is zero
    kl_R = outputs.perception_kl_R if settings.perception.kl == "full" else kl_k3(scores.policy_R, masked_R)
    assert kl_R is not None, "perception.kl=full, but the head was not asked for it"
    kind = settings.entropy.kind if joint else "sampled"  # a frozen branch keeps no logits
    masked_entropy_R = _entropy(kind, masked_R, outputs.masked_entropy_R, settings.masked_entropy_coef)
    return replace(scores, masked_R=masked_R, perception_kl_R=kl_R, masked_entropy_R=masked_entropy_R)


def _entropy(kind: str, logprobs_R: Tensor, full_R: Tensor | None, coef: float) -> Tensor:
    """-log-prob of the sampled token, or the entropy over the whole vocabulary, as `kind` says. Without a coefficient
    the former is enough, since it is only recorded."""
    if kind == "full" and full_R is not None:
        return full_R
    assert kind == "sampled" or coef == 0, "entropy.kind=full, but the head was not asked for it"
    return -logprobs_R
