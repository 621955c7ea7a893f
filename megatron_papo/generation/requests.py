"""Divides the rollouts of a model-parallel group over its ranks, and joins the results.

The ranks of a tensor- and pipeline-parallel group have the same prompts. Instead of generating everything on each rank,
every rank generates a share and the group exchanges the results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_papo.data.order import share_of
from megatron_papo.distributed.exchange import gather_objects
from megatron_papo.distributed.layout import Layout
from megatron_papo.generation.generator import Sampling
from megatron_papo.generation.sampling import rollout_seed
from megatron_papo.types import Group, Prompt, Rollout


@dataclass(frozen=True)
class RolloutRequest:
    """One rollout to make."""

    prompt_index: int
    """Place of the prompt in the call's list of prompts."""
    index: int
    """Place of the rollout in its group."""
    seed: int


@dataclass(frozen=True)
class Answer:
    """One finished rollout, as it travels between ranks."""

    request: RolloutRequest
    response_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str


def make_requests(prompts: Sequence[Prompt], sampling: Sampling) -> list[RolloutRequest]:
    """The requests for all rollouts of a call, group after group."""
    return [
        RolloutRequest(place, index, rollout_seed(sampling.seed, prompt.visit, prompt.id, index))
        for place, prompt in enumerate(prompts)
        for index in range(sampling.group_size)
    ]


def generate_in_shares(
    prompts: Sequence[Prompt],
    sampling: Sampling,
    layout: Layout,
    answer: Callable[[list[RolloutRequest]], list[Answer]],
    decode: Callable[[tuple[int, ...]], str],
    policy_version: int | None,
) -> list[Group]:
    """Groups in the order of `prompts`, the same on every rank of the model-parallel group, which call together.

    `answer` generates this rank's share; `decode` turns token ids into text. Raises RuntimeError while there is no
    `policy_version`: the engine has no weights yet.
    """
    if policy_version is None:
        raise RuntimeError("generate before the first load_weights: the generator has no weights")
    # contiguous shares: a group's rollouts mostly stay together, and their prompt is read once
    answers = answer(list(share_of(make_requests(prompts, sampling), layout.model_rank, layout.model_size)))
    if layout.model_size > 1:
        answers = [each for part in gather_objects(answers, layout.model_group) for each in part]
    return groups_of(prompts, sampling, answers, decode, policy_version)


def groups_of(
    prompts: Sequence[Prompt],
    sampling: Sampling,
    answers: Sequence[Answer],
    decode: Callable[[tuple[int, ...]], str],
    policy_version: int,
) -> list[Group]:
    """The answers to all requests of a call, in whatever order they came, as groups in the order of `prompts`."""
    by_place = {(a.request.prompt_index, a.request.index): a for a in answers}
    assert len(by_place) == len(answers) == len(prompts) * sampling.group_size

    def rollout(answer: Answer) -> Rollout:
        text = decode(answer.response_ids)
        return Rollout(
            answer.request.index, answer.response_ids, answer.logprobs, text, answer.finish_reason, policy_version
        )

    return [
        Group(prompt, tuple(rollout(by_place[place, index]) for index in range(sampling.group_size)))
        for place, prompt in enumerate(prompts)
    ]
