"""Rewards of whole groups: parts by name, and their weighted sum.

reward = accuracy_weight x accuracy + format_weight x format - repetition_weight x repetition + overlong. With the
defaults that is the paper's 0.9 and 0.1. Accuracy reads the last box only; no box is a wrong answer. A think block
that the chat template opens belongs to the answer, for its format and for a user's function. The same input
has the same reward, except for a comparison that takes close to reward.timeout_s: ranks that must agree let one of
them ask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType

from megatron_papo.config import RewardConfig
from megatron_papo.rewards.answers import agree, gold_answer, last_box
from megatron_papo.rewards.parts import (
    anls,
    call_function,
    format_reward,
    load_function,
    overlong,
    repetition,
    without_spaces_at_tags,
)
from megatron_papo.rewards.spelling import normalise
from megatron_papo.rewards.verifier import Verifier
from megatron_papo.types import Group, Prompt, Rollout


class Rewarder:
    """A context manager, because it may hold a worker process."""

    def __init__(
        self, reward: RewardConfig, *, max_response_tokens: int | None = None, response_prefix: str = ""
    ) -> None:
        """`max_response_tokens` is needed with reward.overlong.enabled; `response_prefix` is what the chat template has
        written of every answer (`Processor.response_prefix`). Raises ValueError for a bad reward.function."""
        if reward.overlong.enabled:
            if max_response_tokens is None:
                raise ValueError("reward.overlong: needs generation.max_response_tokens")
            if reward.overlong.buffer > max_response_tokens:
                raise ValueError(
                    f"reward.overlong.buffer={reward.overlong.buffer} exceeds "
                    f"generation.max_response_tokens={max_response_tokens}"
                )
        self._config = reward
        self._max_response_tokens = max_response_tokens
        self._function = load_function(reward.function) if reward.function else None
        self._response_prefix = response_prefix
        self._verifier = Verifier(reward.timeout_s, "mathruler" if reward.accuracy == "mathruler" else "math-verify")

    def __enter__(self) -> Rewarder:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._verifier.close()

    def reward(self, groups: Sequence[Group]) -> list[Group]:
        """The groups with `rewards` and `reward_parts` (unweighted, by name) filled, one entry a rollout."""
        return [self._reward_group(group) for group in groups]

    def parts(self, prompt: Prompt, rollout: Rollout) -> dict[str, float]:
        """The parts of one rollout: accuracy and format always, repetition and overlong where they count."""
        accuracy = max(self._accuracy(prompt.problem, answer, rollout.text) for answer in prompt.answers)
        parts = {"accuracy": accuracy, "format": format_reward(self._response_prefix + rollout.text)}
        if self._config.repetition_weight:
            parts["repetition"] = repetition(rollout.text, self._config.repetition_ngram)
        if self._config.overlong.enabled:
            assert self._max_response_tokens is not None
            parts["overlong"] = overlong(len(rollout.response_ids), self._max_response_tokens, self._config.overlong)
        return parts

    def _reward_group(self, group: Group) -> Group:
        parts = [self.parts(group.prompt, rollout) for rollout in group.rollouts]
        names = parts[0] if parts else ()
        by_name = {name: tuple(part[name] for part in parts) for name in names}
        return replace(group, rewards=tuple(self._total(part) for part in parts), reward_parts=by_name)

    def _total(self, part: dict[str, float]) -> float:
        weighted = self._config.accuracy_weight * part["accuracy"] + self._config.format_weight * part["format"]
        return weighted - self._config.repetition_weight * part.get("repetition", 0.0) + part.get("overlong", 0.0)

    def _accuracy(self, problem: str, right: str, response: str) -> float:
        if self._function is not None:
            return call_function(self._function, self._response_prefix + response, right, problem)
        answer, gold = last_box(response), gold_answer(right)
        if not answer:
            return 0.0
        if self._config.accuracy == "anls":
            return anls(answer, gold)
        if self._config.accuracy == "exact":
            return float(bool(normalise(answer)) and normalise(answer) == normalise(gold))
        if self._config.accuracy == "mathruler":
            return float(self._verifier.equal(without_spaces_at_tags(answer), gold))
        verdict = agree(answer, gold)
        return float(verdict if isinstance(verdict, bool) else self._verifier.equal(*verdict))
