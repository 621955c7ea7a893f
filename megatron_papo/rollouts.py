"""Asking the generator for rollouts, whatever happens to its engine."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_papo.generation import EngineLost, Generator, Sampling
from megatron_papo.record import warn
from megatron_papo.run import Run, hand_over
from megatron_papo.types import Group, Prompt


def generate(run: Run, generator: Generator, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
    """The generator's rollouts. An engine that died is started anew, given the policy's weights and asked again, which
    gives the same rollouts; `generation.restarts` times in a run, then its reason ends the run. All ranks call it."""
    while True:
        version = generator.policy_version
        try:
            return generator.generate(prompts, sampling)
        except EngineLost as lost:
            recover(run, generator, lost, version)


def recover(run: Run, generator: Generator, lost: EngineLost, policy_version: int | None) -> None:
    """After a loss: engines as they were, with the policy's weights of now, which `policy_version` numbers. Raises
    `lost` when there were enough restarts."""
    if run.counts["engine_restarts"] == run.config.generation.restarts or policy_version is None:
        raise lost
    run.counts["engine_restarts"] += 1
    warn(run, f"{lost}; it is started again and asked the same")
    generator.restart()
    hand_over(run, generator, policy_version)
