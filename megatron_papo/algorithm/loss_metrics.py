"""What a micro-batch's loss reports: its terms, and means over its response tokens, as numerators and counts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from megatron_papo.algorithm.estimators import kl_k3, probability_ratio
from megatron_papo.algorithm.token_scores import TokenScores
from megatron_papo.config import LossConfig
from megatron_papo.types import Metrics, MicroBatch


@torch.no_grad()
def papo_metrics(terms: Mapping[str, Tensor], scores: TokenScores, row: MicroBatch, loss: LossConfig) -> Metrics:
    """`loss/NAME` is what a term adds to the loss, coefficient and sign included, with a count of 0: one micro-batch
    does not know how many make a step (`types.Metrics`). The others are means over the response tokens that a loss
    reads, those of the masked view over the tokens whose prompt has an image (a count of 0 when there is none).

    What compares engine and trainer is measured where the old policy's log-probs are known: not from the second
    update on with `loss.old_logprobs=rollout`.
    """
    sums = loss_sums(terms)
    for name, values_R, mask_R in _means(scores, row, loss):
        sums[name] = (values_R * mask_R).sum(), mask_R.sum()
    if scores.trainer_R is not None:
        gap_R = (scores.trainer_R - row.rollout_logprobs_R).abs() * row.loss_mask_R
        sums["rollout_gap_max"] = gap_R.max(), gap_R.new_ones(())
    return to_host(sums)


def loss_sums(terms: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """The terms as `loss/NAME` with a count of 0."""
    return {f"loss/{name}": (term, torch.zeros_like(term)) for name, term in terms.items()}


def to_host(sums: Mapping[str, tuple[Tensor, Tensor]]) -> Metrics:
    """Numerators and counts as numbers, with one copy to the host for all of them."""
    flat = torch.stack([value.detach().double() for pair in sums.values() for value in pair]).tolist()
    return dict(zip(sums, zip(flat[::2], flat[1::2])))


def _means(scores: TokenScores, row: MicroBatch, loss: LossConfig) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, values, and the mask of the tokens that the mean is over), [R] each."""
    tokens_R, image_R = row.loss_mask_R, row.loss_mask_R & row.has_image_R
    yield "policy_logprobs", scores.policy_R, tokens_R
    yield "entropy", scores.entropy_R, tokens_R
    for name, values_R in _clipping(scores, row, loss):
        yield name, values_R, tokens_R
    if scores.trainer_R is not None:
        yield "rollout_gap", (scores.trainer_R - row.rollout_logprobs_R).abs(), tokens_R
        yield "rollout_kl", kl_k3(row.rollout_logprobs_R, scores.trainer_R), tokens_R  # KL(engine || trainer)
    if scores.correction_R is not None:
        yield "correction", scores.correction_R, tokens_R
        cut_R = scores.correction_R == (0 if loss.correction == "masked" else loss.correction_cap)
        yield "correction_cut", cut_R, tokens_R
    if scores.ref_kl_R is not None:
        yield "ref_kl", scores.ref_kl_R, tokens_R
    if scores.perception_kl_R is not None:
        yield "perception_kl", scores.perception_kl_R, image_R
        yield "perception_kl_squared", scores.perception_kl_R.square(), image_R
    if scores.masked_entropy_R is not None:
        yield "masked_entropy", scores.masked_entropy_R, image_R


def _clipping(scores: TokenScores, row: MicroBatch, loss: LossConfig) -> Iterator[tuple[str, Tensor]]:
    """How far the policy has moved from the old one, and which tokens are clipped for it."""
    ratio_R, worse_R = probability_ratio(scores.policy_R, scores.old_R), row.advantages_R < 0
    yield "ratio", ratio_R
    yield "policy_kl", kl_k3(scores.old_R, scores.policy_R)  # KL(old || policy): the tokens are the old policy's
    low_R = worse_R & (ratio_R < 1 - loss.clip_low)
    high_R = (row.advantages_R > 0) & (ratio_R > 1 + loss.clip_high)
    yield "clip_low", low_R
    yield "clip_high", high_R
    yield "clip_fraction", low_R | high_R
    yield "clip_dual", worse_R & (ratio_R > (loss.dual_clip or torch.inf))
