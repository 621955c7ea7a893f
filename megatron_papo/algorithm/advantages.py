"""Advantages, normalised within each group, and which groups dynamic sampling keeps. There is no value model."""

from __future__ import annotations

import statistics
from dataclasses import replace

from megatron_papo.config import DynamicSamplingConfig
from megatron_papo.types import Group

EPS = 1e-6
"""Added to the standard deviation before dividing by it."""


def group_advantages(rewards: tuple[float, ...]) -> tuple[float, ...]:
    """(reward - mean) / (std + 1e-6) within one group, unbiased std (GRPO, arXiv 2402.03300).

    Equal rewards give exactly 0, decided on the rewards: the mean of equal floats need not be that float.
    """
    if not rewards or min(rewards) == max(rewards):
        return (0.0,) * len(rewards)
    mean, std = statistics.fmean(rewards), reward_std(rewards)
    return tuple((reward - mean) / (std + EPS) for reward in rewards)


def reward_std(rewards: tuple[float, ...]) -> float:
    """The unbiased standard deviation of a group's rewards, which advantages divide by; 0 for a single reward."""
    return statistics.stdev(rewards) if len(rewards) > 1 else 0.0


def with_advantages(group: Group) -> Group:
    """The group with one advantage per rollout. Raises ValueError where a rollout has no finite reward."""
    if len(group.rewards) != len(group.rollouts):
        raise ValueError(f"prompt {group.prompt.id}: {len(group.rewards)} rewards for {len(group.rollouts)} rollouts")
    if not all(abs(reward) < float("inf") for reward in group.rewards):
        raise ValueError(f"prompt {group.prompt.id}: rewards {list(group.rewards)} are not all finite")
    return replace(group, advantages=group_advantages(group.rewards))


def keep_group(group: Group, sampling: DynamicSamplingConfig) -> bool:
    """Whether the group's mean accuracy lies strictly between the bounds (DAPO, arXiv 2503.14476)."""
    accuracy = group.reward_parts.get("accuracy")
    if not accuracy:
        raise ValueError(f"prompt {group.prompt.id}: dynamic sampling needs the reward part `accuracy`")
    return sampling.low < statistics.fmean(accuracy) < sampling.high
