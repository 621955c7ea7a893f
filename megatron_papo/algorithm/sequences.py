"""Reductions over the tokens of each response, for the flat [R] tensors of a row.

`rollout_index_R` says which response a token belongs to. `packing` never splits a response: all of its tokens lie in
one micro-batch, next to each other, so that no result here depends on how a batch is split into rows. What is
normalised over the responses of a whole batch needs an exchange between ranks and does not belong here.
"""

from __future__ import annotations

import torch
from torch import Tensor


def response_sums(values_R: Tensor, rollout_index_R: Tensor) -> Tensor:
    """[R] at place i the sum over the tokens of response i, in the dtype of `values_R`.

    There are no more responses than tokens; the places beyond the last response are zero. Reading the number of
    responses from a GPU's tensor would make the host wait.
    """
    return torch.zeros_like(values_R).index_add(0, rollout_index_R, values_R)


def response_means(values_R: Tensor, rollout_index_R: Tensor, mask_R: Tensor) -> Tensor:
    """[R] for each token the mean of `values_R` over those tokens of its response that `mask_R` (bool) names; 0 where
    it names none."""
    mask_R = mask_R.to(values_R.dtype)
    sums_R = response_sums(values_R * mask_R, rollout_index_R)
    counts_R = response_sums(mask_R, rollout_index_R)
    return (sums_R / counts_R.clamp(min=1))[rollout_index_R]


@torch.no_grad()
def top_tokens(values_R: Tensor, rollout_index_R: Tensor, eligible_R: Tensor, fraction: float) -> Tensor:
    """[R] bool: within each response, the ceil(fraction x eligible) eligible tokens of highest value; of equal values,
    the earlier token."""
    lengths_R = response_sums(torch.ones_like(rollout_index_R), rollout_index_R)
    starts_R = lengths_R.cumsum(0).roll(1)
    starts_R[:1] = 0
    num_eligible_R = response_sums(eligible_R.to(rollout_index_R.dtype), rollout_index_R)
    num_top_R = (num_eligible_R.double() * fraction - 1e-9).ceil()  # 0.14 x 50 is a little more than 7
    order_R = values_R.masked_fill(~eligible_R, -torch.inf).argsort(descending=True, stable=True)
    order_R = order_R[rollout_index_R[order_R].argsort(stable=True)]  # by response, and within it by value
    response_R = rollout_index_R[order_R]
    rank_R = torch.arange(order_R.numel(), device=order_R.device) - starts_R[response_R]
    return torch.zeros_like(eligible_R).index_put((order_R,), rank_R < num_top_R[response_R])
