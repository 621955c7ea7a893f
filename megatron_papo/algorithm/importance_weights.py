"""Off-policy correction: what the engine sampled from, against what the trainer takes for the old policy.

An engine computes in another precision, with other kernels, cuts its distribution (top-p) and, one step ahead, has
older weights. Its log-probs `rollout_logprobs` then differ from the trainer's recomputed ones, and the policy gradient
is that of the wrong expectation. Importance sampling weighs each token by ratio = exp(old - rollout): truncated at a
cap (TIS, "Your efficient RL framework secretly brings you off-policy RL training", Yao et al. 2025), or masked, which
leaves out what lies outside an interval (IcePop, Ling team 2025). Pure torch; the weights are constants.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_papo.config import LossConfig
from megatron_papo.types import MicroBatch

_MOST = 20.0
"""Bound of a log-ratio before exp."""


@torch.no_grad()
def correction_weights(trainer_R: Tensor, row: MicroBatch, loss: LossConfig) -> Tensor | None:
    """[R] factors of the policy term, as `loss.correction` says; None when there is no correction.

    `trainer_R`: log-probs of the old policy as the trainer computes them. The means' denominators stay as they are, so
    that a masked token counts as one without advantage.
    """
    if loss.correction == "none":
        return None
    ratio_R = _log_ratio(trainer_R, row, loss.correction_level).clamp(-_MOST, _MOST).exp()
    if loss.correction == "truncated":
        return ratio_R.clamp(max=loss.correction_cap)
    inside_R = (ratio_R >= loss.correction_floor) & (ratio_R <= loss.correction_cap)
    return ratio_R * inside_R


def _log_ratio(trainer_R: Tensor, row: MicroBatch, level: str) -> Tensor:
    """log(old / rollout) of each token, or for each token the mean over its response. A response lies whole in one
    micro-batch, so neither depends on how a batch is split."""
    gap_R = trainer_R - row.rollout_logprobs_R
    if level == "token":
        return gap_R
    index_R, read_R = row.rollout_index_R, row.loss_mask_R.to(gap_R.dtype)
    sums_R = torch.zeros_like(gap_R).index_add(0, index_R, gap_R * read_R)  # no more responses than tokens
    counts_R = torch.zeros_like(gap_R).index_add(0, index_R, read_R)
    return (sums_R / counts_R.clamp(min=1))[index_R]
