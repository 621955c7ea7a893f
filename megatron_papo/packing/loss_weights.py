"""The weight of a token: its share in the mean over the whole optimizer step.

The totals over all data-parallel ranks (`token_totals`, summed by the caller) are known before packing, so neither the
token budget nor the layout changes the gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass

from megatron_papo.config import LossConfig
from megatron_papo.types import Group


@dataclass(frozen=True)
class Totals:
    """The denominators of the means; `sum_totals` adds them up over data-parallel ranks."""

    num_sequences: float = 0.0
    """Number of responses."""
    num_tokens: float = 0.0
    """Response tokens that a loss reads (`Rollout.loss_mask`)."""
    num_image_sequences: float = 0.0
    """Number of responses to prompts with an image."""
    num_image_tokens: float = 0.0
    """Response tokens that a loss reads, of prompts with an image."""


def sum_totals(totals: Iterable[Totals]) -> Totals:
    """The totals of several ranks, or of several lists of groups, added up."""
    return Totals(*(sum(column) for column in zip(*map(astuple, totals))))


def token_totals(groups: Sequence[Group]) -> Totals:
    """The totals of these groups."""
    return sum_totals(_group_totals(group) for group in groups)


def rollout_weights(group: Group, index: int, loss: LossConfig, totals: Totals) -> tuple[float, float]:
    """The weights of the response tokens of one rollout: in the policy terms, and in the perception terms. Each holds
    for every token that a loss reads."""
    length = sum(group.rollouts[index].loss_mask)
    weight = _weight(length, loss, totals.num_sequences, totals.num_tokens)
    if not group.prompt.has_image:
        return weight, 0.0
    return weight, _weight(length, loss, totals.num_image_sequences, totals.num_image_tokens)


def _group_totals(group: Group) -> Totals:
    num_sequences, num_tokens = len(group.rollouts), sum(sum(rollout.loss_mask) for rollout in group.rollouts)
    image = group.prompt.has_image
    return Totals(num_sequences, num_tokens, num_sequences * image, num_tokens * image)


def _weight(length: int, loss: LossConfig, num_sequences: float, num_tokens: float) -> float:
    if loss.averaging == "token":
        return 1.0 / num_tokens
    if loss.averaging == "sequence":
        return 1.0 / (num_sequences * max(length, 1))
    assert loss.fixed_denominator is not None
    return 1.0 / loss.fixed_denominator
