"""Rewards of whole groups: parts by name, and their weighted sum.

reward = accuracy_weight x accuracy + format_weight x format - repetition_weight x repetition + overlong. With the
defaults that is the paper's 0.9 and 0.1. Accuracy reads the last box only; no box is a wrong answer. A think block
that the chat template opens belongs to the answer, for its format and for a user's function. The same input
has the same reward, except for a comparison that takes close to reward.timeout_s: ranks that must agree let one of
them ask.

A user's function stands in place of the accuracy. The parts that it returns by name are added with reward.weights; one
with the name of a part above takes that part's place and weight. Without a part `accuracy` the weighted sum of its
parts is reported as the accuracy, for dynamic sampling and evaluations, and not added again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType

from megatron_papo.config import RewardConfig
from megatron_papo.rewards.answers import agree, gold_answer, last_box
from megatron_papo.rewards.asking import Asking
from megatron_papo.rewards.own_function import OwnFunction
from megatron_papo.rewards.parts import anls, format_reward, overlong, repetition, without_spaces_at_tags
from megatron_papo.rewards.returned import FAILED, Failed, Value
from megatron_papo.rewards.reward_row import RewardRow, rows_of
from megatron_papo.rewards.spelling import normalise
from megatron_papo.rewards.verifier import Verifier
from megatron_papo.types import Group, Prompt, Rollout


def _nobody(done: int, total: int) -> None:
    """Reports progress to nobody."""


class Rewarder:
    """A context manager, because it may hold a worker process or the threads of a user's function."""

    def __init__(
        self,
        reward: RewardConfig,
        *,
        max_response_tokens: int | None = None,
        response_prefix: str = "",
        report: Callable[[int, int], None] = _nobody,
    ) -> None:
        """`max_response_tokens` is needed with reward.overlong.enabled; `response_prefix` is what the chat template has
        written of every answer (`Processor.response_prefix`); `report` is told how many groups or rows of how many are
        done. Raises ValueError for a bad reward.function."""
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
        self.function = OwnFunction(reward, reward.function) if reward.function else None
        """The user's function; None: answers are compared as reward.accuracy says."""
        self._response_prefix, self._report = response_prefix, report
        self._verifier = Verifier(reward.timeout_s, "mathruler" if reward.accuracy == "mathruler" else "math-verify")
        self._failures: list[tuple[RewardRow, Failed]] = []

    def __enter__(self) -> Rewarder:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._verifier.close()
        if self.function is not None:
            self.function.close()

    def ask(self, groups: Sequence[Group], step: int | None = None) -> Asking | None:
        """Begins to ask a user's function about these groups, so that the caller can do something else while it waits.
        None where nothing is asked: there is no function, or one that does not take rows."""
        if self.function is None or not self.function.takes_rows:
            return None
        return self.function.ask([rows_of(group, self._response_prefix, step) for group in groups])

    def reward(self, groups: Sequence[Group], step: int | None = None, asking: Asking | None = None) -> list[Group]:
        """The groups with `rewards` and `reward_parts` (unweighted, by name) filled, one entry a rollout. Where there
        is a user's function, the part `failed` is 1 for a rollout for which it failed, and what it returns is 0 there.

        `step`: of the training; None in an evaluation. `asking`: what `ask` gave for these groups; it is waited for.
        """
        asking = asking or self.ask(groups, step)
        while asking is not None and not asking.wait(1.0):
            self._report(*asking.progress)
        values = iter(asking.values if asking is not None else ())
        rewarded = []
        for group in groups:
            own: list[Value | Failed] = []
            if self.function is not None:
                rows = rows_of(group, self._response_prefix, step)
                own = [self.function.call(row) if asking is None else next(values) for row in rows]
                self._failures += [(row, value) for row, value in zip(rows, own) if isinstance(value, Failed)]
            rewarded.append(self._reward_group(group, own))
            self._report(len(rewarded), len(groups))
        return rewarded

    def take_failures(self) -> list[tuple[RewardRow, Failed]]:
        """The rows for which the user's function has failed since the last call."""
        failures, self._failures = self._failures, []
        return failures

    def parts(self, prompt: Prompt, rollout: Rollout) -> dict[str, float]:
        """The parts of one rollout without a user's function: accuracy and format always, repetition and overlong where
        they count."""
        accuracy = max(self._accuracy(answer, rollout.text) for answer in prompt.answers)
        return {"accuracy": accuracy} | self._other_parts(rollout)

    def _other_parts(self, rollout: Rollout) -> dict[str, float]:
        """The parts beside accuracy."""
        parts = {"format": format_reward(self._response_prefix + rollout.text)}
        if self._config.repetition_weight:
            parts["repetition"] = repetition(rollout.text, self._config.repetition_ngram)
        if self._config.overlong.enabled:
            assert self._max_response_tokens is not None
            parts["overlong"] = overlong(len(rollout.response_ids), self._max_response_tokens, self._config.overlong)
        return parts

    def _reward_group(self, group: Group, own: Sequence[Value | Failed]) -> Group:
        """`own`: what the user's function gave for each rollout; empty where there is none."""
        if self.function is None:
            found = [self.parts(group.prompt, rollout) for rollout in group.rollouts]
            totals = [self._total(parts) for parts in found]
        else:
            pairs = [self._with_own(rollout, value) for rollout, value in zip(group.rollouts, own, strict=True)]
            found, totals = [parts for parts, _ in pairs], [total for _, total in pairs]
        names = dict.fromkeys(name for parts in found for name in parts)
        by_name = {name: tuple(parts.get(name, 0.0) for parts in found) for name in names}
        return replace(group, rewards=tuple(totals), reward_parts=by_name)

    def _with_own(self, rollout: Rollout, value: Value | Failed) -> tuple[dict[str, float], float]:
        """Parts and reward of a rollout for which the user's function gave `value`."""
        if isinstance(value, Failed):
            own: dict[str, float] = {"accuracy": 0.0}
        else:
            own = value if isinstance(value, dict) else {"accuracy": value}
        parts = {"accuracy": 0.0} | self._other_parts(rollout) | own
        total = self._total(parts)
        if "accuracy" not in own:
            parts["accuracy"] = self._total(own)
        return parts | {FAILED: float(isinstance(value, Failed))}, total

    def _total(self, parts: dict[str, float]) -> float:
        """The weighted sum."""
        config = self._config
        weights = {
            "accuracy": config.accuracy_weight,
            "format": config.format_weight,
            "repetition": -config.repetition_weight,
        }
        total = 0.0
        for name, value in parts.items():  # not `sum`, which rounds otherwise in newer versions of Python
            total += weights.get(name, config.weights.get(name, 1.0)) * value
        return total

    def _accuracy(self, right: str, response: str) -> float:
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
