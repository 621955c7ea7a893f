"""What a user's own function is given: responses with all that belongs to them, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_papo.types import Group


@dataclass(frozen=True, kw_only=True)
class RewardRow:
    """One response, as `reward.function` is given it."""

    response: str
    """The response as generated, with the think block that the chat template opens. Not trusted: a model wrote it."""
    answer: str
    """The right answer, or the first of several, as in the data set."""
    answers: tuple[str, ...]
    """All right answers."""
    problem: str
    """The text of the question, as in the data set."""
    columns: Mapping[str, Any]
    """The other cells of the data set's row, by the names of their columns; pictures are left out."""
    source: str
    """Name of the data set that the row comes from; empty where a run reads only one."""
    images: tuple[bytes, ...] = field(repr=False)
    """The pictures of the question, compressed (PNG, JPEG) as in the data set."""
    finish_reason: str
    """Why the response ended: `stop`, or `length` where it was cut off at `generation.max_response_tokens`."""
    num_tokens: int
    """Tokens of the response."""
    prompt_id: str
    """Name of the data set's row, the same in the whole run."""
    rollout: int
    """Which of the responses to the prompt this is, from 0."""
    step: int | None
    """Step of the training, from 0; None where a model is evaluated."""


@dataclass(frozen=True, kw_only=True)
class MetricRow(RewardRow):
    """One response that a step has trained on, as the functions of `observe.metrics` are given it."""

    reward: float
    """The response's reward."""
    reward_parts: Mapping[str, float]
    """Named parts of the reward before weighting, e.g. accuracy and format."""
    advantage: float
    """The response's advantage within its group."""


def rows_of(group: Group, response_prefix: str, step: int | None) -> list[RewardRow]:
    """One row a rollout; `response_prefix` is what the chat template has written of every response."""
    return [RewardRow(**_facts(group, place, response_prefix, step)) for place in range(len(group.rollouts))]


def metric_rows_of(group: Group, response_prefix: str, step: int) -> list[MetricRow]:
    """One row a rollout of a group that has rewards and advantages."""
    return [
        MetricRow(
            **_facts(group, place, response_prefix, step),
            reward=group.rewards[place],
            reward_parts={name: values[place] for name, values in group.reward_parts.items()},
            advantage=group.advantages[place],
        )
        for place in range(len(group.rollouts))
    ]


def _facts(group: Group, place: int, response_prefix: str, step: int | None) -> dict[str, Any]:
    """The fields of `RewardRow` for one rollout."""
    prompt, rollout = group.prompt, group.rollouts[place]
    return {
        "response": response_prefix + rollout.text,
        "answer": prompt.answer,
        "answers": prompt.answers,
        "problem": prompt.problem,
        "columns": prompt.columns,
        "source": prompt.source,
        "images": prompt.images,
        "finish_reason": rollout.finish_reason,
        "num_tokens": len(rollout.response_ids),
        "prompt_id": prompt.id,
        "rollout": rollout.index,
        "step": step,
    }
