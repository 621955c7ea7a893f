"""The PAPO objective per response token, in nats and fp32. Pure torch.

Every term is a weighted sum: `weights_R` and `perception_weights_R` already hold each token's share in the global
mean, so micro-batches and data-parallel ranks add up and no layout changes the gradient.
What the terms are made of is in `token_scores.py`, the policy term in `policy_losses.py`, what is reported in
`loss_metrics.py`.
Departs from the paper: by default no gradient flows through the masked branch, and the ratio within k3 is
pi_masked / pi. docs/departures.md has these and all others, from the paper's reference code too.
Source: Perception-Aware Policy Optimization, arXiv 2507.06448.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_papo.algorithm.credit import Credit, equal_credit
from megatron_papo.algorithm.loss_metrics import loss_sums, papo_metrics, to_host
from megatron_papo.algorithm.loss_settings import LossSettings
from megatron_papo.algorithm.policy_losses import POLICY_LOSSES
from megatron_papo.algorithm.sequences import top_tokens
from megatron_papo.algorithm.token_scores import TokenScores, token_scores
from megatron_papo.config import PerceptionConfig
from megatron_papo.types import HeadOutputs, Metrics, MicroBatch


class Term(NamedTuple):
    """One term of the objective: coef * sum(weights_R * values_R)."""

    name: str
    coef: float
    """Positive where the loss minimises the term; negative for the perception term, which is maximised."""
    weights_R: Tensor
    values_R: Tensor


def papo_loss(
    outputs: HeadOutputs, row: MicroBatch, settings: LossSettings, credit: Credit = equal_credit
) -> tuple[Tensor, Metrics]:
    """This micro-batch's part of the loss, a scalar that is summed over micro-batches, never averaged; its metrics.

    In the first update of a rollout batch `row` may lack old log-probs: the policy is the old policy then.
    """
    scores = token_scores(outputs, row, settings)
    terms = {
        term.name: term.coef * (term.weights_R * term.values_R).sum()
        for term in _objective(scores, row, settings, credit)
        if term.coef != 0
    }
    total = torch.stack(list(terms.values())).sum()
    return total, papo_metrics(terms | {"total": total}, scores, row, settings.loss)


def _objective(scores: TokenScores, row: MicroBatch, settings: LossSettings, credit: Credit) -> Iterator[Term]:
    """The terms of the paper's objective, in its order; a term is left out where its model was not scored."""
    loss, weights_R, image_weights_R = settings.loss, row.weights_R, row.perception_weights_R
    credit_R = credit(scores.detached(), row)
    advantages_R = row.advantages_R if credit_R is None else row.advantages_R * credit_R
    policy_R = POLICY_LOSSES[loss.policy_loss](scores.policy_R, scores.old_R, advantages_R, row, loss)
    if scores.correction_R is not None:
        policy_R = policy_R * scores.correction_R
    yield Term("policy", 1.0, weights_R, policy_R)
    yield Term("entropy", settings.entropy_coef, weights_R, scores.entropy_R)
    if scores.ref_kl_R is not None:
        yield Term("reference", loss.reference_coef, weights_R, scores.ref_kl_R)
    if scores.perception_kl_R is not None:
        perception_R = perception_term(scores.perception_kl_R, row, settings.perception)
        yield Term("perception", -settings.perception_coef, image_weights_R, perception_R)
    if scores.masked_entropy_R is not None:
        yield Term("masked_entropy", settings.masked_entropy_coef, image_weights_R, scores.masked_entropy_R)


def perception_term(kl_R: Tensor, row: MicroBatch, perception: PerceptionConfig) -> Tensor:
    """[R] the perception KL as the loss reads it: bounded by `clamp`, zero outside each response's `top_fraction`.

    The mean is still over all response tokens whose prompt has an image, so that a smaller fraction does not increase
    the gradient of any token.
    """
    bounded_R = kl_R if perception.clamp is None else kl_R.clamp(0, perception.clamp)
    if perception.top_fraction == 1.0:
        return bounded_R
    eligible_R = row.loss_mask_R & row.has_image_R
    return bounded_R * top_tokens(kl_R, row.rollout_index_R, eligible_R, perception.top_fraction)


def sft_loss(outputs: HeadOutputs, row: MicroBatch) -> tuple[Tensor, Metrics]:
    """Cross-entropy of the demonstrations' tokens: the weighted sum of -log-prob, to be summed over micro-batches."""
    total = -(row.weights_R * outputs.policy_logprobs_R).sum()
    mask_R = row.loss_mask_R
    logprobs = ((outputs.policy_logprobs_R * mask_R).sum(), mask_R.sum())
    return total, to_host(loss_sums({"total": total}) | {"policy_logprobs": logprobs})
