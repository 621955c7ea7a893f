"""Gets rollouts from the generator, rewards them, and hands weights over to it, even if an engine fails.

An engine that died is started again, is given the policy's weights and generates the same rollouts, up to
`generation.restarts` times in a run; after that its failure ends the run. All ranks call these functions together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron_papo.distributed.exchange import any_rank, gather_objects
from megatron_papo.generation import EngineLost, Generator, Sampling
from megatron_papo.generation.remote.remote_generator import RemoteGenerator
from megatron_papo.rewards import Rewarder
from megatron_papo.training.console import warn
from megatron_papo.training.reward_failures import tell_of_failures, without_failures
from megatron_papo.training.session import Run
from megatron_papo.types import Group, Prompt
from megatron_papo.weights.transfer import hf_tensors

_ROUND_S = 1.0
"""Seconds between two moments at which ranks tell each other that they still wait for a user's function: the watchdog
of each sees progress then."""


def generate(run: Run, generator: Generator, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
    """The generator's rollouts for `prompts`; a restarted engine samples the same ones."""
    while True:
        give_weights_again(run, generator)
        version = generator.policy_version
        try:
            return generator.generate(prompts, sampling)
        except EngineLost as lost:
            recover(run, generator, lost, version)


def collect(
    run: Run, generator: RemoteGenerator, prompts: Sequence[Prompt], sampling: Sampling, policy_version: int
) -> list[Group]:
    """The rollouts of `generator.submit(prompts, sampling)`.

    A restarted engine samples them with the policy as it is now, which `policy_version` numbers: the weights that they
    were submitted for may exist no longer.
    """
    while True:
        try:
            return generator.collect()
        except EngineLost as lost:
            recover(run, generator, lost, policy_version)
            generator.submit(prompts, sampling)


def build_rewarder(run: Run) -> Rewarder:
    """What gives each response its reward, as the section `reward` says; a context that ends its worker processes."""
    return Rewarder(
        run.config.reward,
        max_response_tokens=run.config.generation.max_response_tokens,
        response_prefix=run.processor.response_prefix,
        report=run.clock.report,
    )


def reward_groups(run: Run, rewarder: Rewarder, groups: Sequence[Group], step: int | None = None) -> list[Group]:
    """The groups with their rewards; `step` is the training's, None in an evaluation. All ranks call it.

    The ranks of a model-parallel group, which all hold the same groups, share the work and ask for each reward once, so
    that a verdict that ran into its time limit is the same for all of them. Raises ValueError where reward.on_failure
    lets no failure of the user's function pass, and where it failed for all rows of a step.
    """
    group, rank = run.layout.model_group, run.layout.model_group.rank()
    own = groups[rank :: group.size()]
    asking = rewarder.ask(own, step)
    while asking is not None and any_rank(not asking.wait(_ROUND_S)):
        run.clock.report(*asking.progress)  # each call ends in time, so a rank that waits for others is not stuck
    shares = gather_objects([(each.rewards, each.reward_parts) for each in rewarder.reward(own, step, asking)], group)
    rewarded = [
        replace(each, rewards=rewards, reward_parts=parts)
        for index, each in enumerate(groups)
        for rewards, parts in [shares[index % group.size()][index // group.size()]]
    ]
    if rewarder.function is None:
        return rewarded
    failed = tell_of_failures(run, rewarder.function, rewarder.take_failures(), rewarded, step)
    return rewarded if failed or rewarder.function.takes_rows else [without_failures(each) for each in rewarded]


def hand_over(run: Run, generator: Generator, policy_version: int) -> None:
    """Gives the generator the policy's weights as they are now."""
    while True:
        try:
            return give_weights(run, generator, policy_version)
        except EngineLost as lost:
            _restart(run, generator, lost)


def give_weights(run: Run, generator: Generator, policy_version: int) -> None:
    """One attempt of `hand_over`; raises EngineLost."""
    bucket_bytes = run.config.generation.bucket_mib * 2**20
    tensors = hf_tensors(run.policy, run.shape, module_names=True, bucket_bytes=bucket_bytes)
    generator.load_weights(tensors, policy_version)


def give_weights_again(run: Run, generator: Generator) -> None:
    """Gives the policy's weights again to an engine that dropped them as it slept; no update has been made since."""
    if generator.forgotten_version is not None:
        hand_over(run, generator, generator.forgotten_version)


def recover(run: Run, generator: Generator, lost: EngineLost, policy_version: int | None) -> None:
    """Restarts an engine that died and gives it the policy's weights as they are now, which `policy_version` numbers.
    Raises `lost` where there are no weights to give (None), or where the run has used up its restarts."""
    if policy_version is None:
        raise lost
    _restart(run, generator, lost)
    hand_over(run, generator, policy_version)


def _restart(run: Run, generator: Generator, lost: EngineLost) -> None:
    if run.counts["engine_restarts"] == run.config.generation.restarts:
        raise lost
    run.counts["engine_restarts"] += 1
    warn(run, f"{lost}; it is started again and asked the same")
    generator.restart()
