"""Importance weights that correct for the difference between the engine's distribution and the trainer's old policy.

An engine computes in another precision and with other kernels, cuts its distribution (top-p) and, one step ahead, has
older weights. Its log-probs (`rollout_logprobs_R`) then differ from those that the trainer computes, and the expected
policy gradient is biased. Importance sampling weighs each token by ratio = exp(old - rollout): truncated at a cap (TIS,
"Your efficient RL framework secretly brings you off-policy RL training", Yao et al. 2025), or masked, which leaves out
tokens outside an interval (IcePop, Ling team 2025). Pure torch; no gradient flows through the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_papo.algorithm.estimators import MAX_LOG_RATIO
from megatron_papo.algorithm.sequences import response_means
from megatron_papo.config import LossConfig
from megatron_papo.types import MicroBatch


@torch.no_grad()
def correction_weights(trainer_R: Tensor, row: MicroBatch, loss: LossConfig) -> Tensor | None:
    """[R] factors of the policy term, as `loss.correction` says; None where there is no correction.

    `trainer_R`: log-probs of the old policy as the trainer computes them. The denominators of the means do not change:
    a token with a weight of zero counts as one without advantage.
    """
    if loss.correction == "none":
        return None
    ratio_R = _log_ratio(trainer_R, row, loss.correction_level).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    if loss.correction == "truncated":
        return ratio_R.clamp(max=loss.correction_cap)
    inside_R = (ratio_R >= loss.correction_floor) & (ratio_R <= loss.correction_cap)
    return ratio_R * inside_R


def _log_ratio(trainer_R: Tensor, row: MicroBatch, level: str) -> Tensor:
    """[R] log(old / rollout) of each token, or for each token the mean over its response."""
    gap_R = trainer_R - row.rollout_logprobs_R
    if level == "token":
        return gap_R
    return response_means(gap_R, row.rollout_index_R, row.loss_mask_R)
