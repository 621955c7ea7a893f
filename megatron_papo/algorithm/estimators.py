"""What two log-probs of the same token say of each other: the ratio of probabilities, and a KL estimate."""

from __future__ import annotations

from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Log-ratios are cut to this size before exp, in nats: inf * 0 is NaN in backward."""


def probability_ratio(logprobs_R: Tensor, other_R: Tensor) -> Tensor:
    """[R] exp(logprobs - other), from e^-20 to e^20."""
    return (logprobs_R - other_R).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def kl_k3(logprobs_R: Tensor, other_R: Tensor) -> Tensor:
    """[R] k3 estimate of KL(policy || other), nats per token; >= 0, zero iff equal (Schulman 2020); at most 10."""
    gap_R = (other_R - logprobs_R).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return (gap_R.expm1() - gap_R).clamp(-10, 10)
