"""`papo train` with `train.ahead`: the engines make the rollouts of the next step while this one trains.

The second driver: its stages are those of `train.py`, in another order. Rollouts of step k are sampled with the
weights that step k - 1 began with, one step old when they are trained on; `loss.correction` accounts for that, by
the ratio of the log-probs the trainer recomputes to those the engine reported. The first step's are not old.
A checkpoint waits for the rollouts under way and holds them, so that a run that is interrupted goes on as if it had
not been. Left out: more than one step ahead; dynamic sampling, which does not know beforehand what it will ask for.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_papo.config import Config
from megatron_papo.distributed.exchange import sum_metrics
from megatron_papo.generation.remote.remote_generator import RemoteGenerator
from megatron_papo.observe.profiling import profiled
from megatron_papo.runtime.failures import RunStopped
from megatron_papo.runtime.stop_signal import StopSignal
from megatron_papo.train import (
    Training,
    draw_prompts_of,
    evaluate_heldout,
    evaluation_is_due,
    learn,
    open_training,
    reason_to_stop,
    restore,
    state_of,
)
from megatron_papo.training.checkpoints import Checkpoints
from megatron_papo.training.console import warn
from megatron_papo.training.dynamic_sampling import ChosenGroups
from megatron_papo.training.engine_rank import serve, serves
from megatron_papo.training.pending_rollouts import PendingRollouts, age, from_state, to_state
from megatron_papo.training.prompts import sampling_of
from megatron_papo.training.recorder import Recorder, StepPlanner
from megatron_papo.training.rollouts import collect, hand_over, reward_groups
from megatron_papo.training.session import open_run
from megatron_papo.types import Group, Metrics


def main(config: Config, planner: StepPlanner | None = None) -> int:
    """As `train.main`."""
    if serves(config):
        return serve(config)
    num_steps = config.train.steps
    with (
        StopSignal() as stop,
        open_run(config, config.generation.num_engine_ranks) as run,
        open_training(run) as training,
        Checkpoints(run, training.optimizer, "train", training.origin) as checkpoints,
    ):
        kept, first_step = _resume(training, checkpoints), checkpoints.next_step
        run.clock.take()  # what came before is no step's time
        with Recorder(run, first_step, num_steps, planner) as recorder:
            if first_step == 0 and evaluation_is_due(training, -1):
                recorder.record_start(evaluate_heldout(training))
            pending = kept or (submit_next(training, first_step) if first_step < num_steps else None)
            for step in range(first_step, num_steps):
                assert pending is not None and pending.step == step
                with profiled(config.observe, run.folder, run.layout.rank, step):
                    groups, metrics, pending = train_step(training, pending)
                scores: dict[str, float] = {}
                if evaluation_is_due(training, step):
                    pending = wait_for(training, pending) if pending else None
                    _hand_over(training, policy_version=step + 1)
                    scores = evaluate_heldout(training)
                recorder.record(step, groups, metrics, scores)
                stopped = reason_to_stop(training, metrics)
                leaving = stop.asked()
                now = bool(stopped) or leaving
                if checkpoints.is_due(step, num_steps, scores, now=now):
                    pending = wait_for(training, pending) if pending else None
                    checkpoints.save_when_due(step, num_steps, _state(training, pending), scores, now=now)
                if stopped:
                    raise RunStopped(f"stopped the run after step {step}: {stopped}")
                if leaving:
                    return checkpoints.leave(step)
        checkpoints.export()
        return 0


def train_step(training: Training, pending: PendingRollouts) -> tuple[list[Group], Metrics, PendingRollouts | None]:
    """Collects the rollouts of a step, sends off those of the next, and trains; what `train.train_step` gives, and the
    rollouts that are now under way: none after the last step."""
    run, config, step = training.run, training.run.config, pending.step
    pending = wait_for(training, pending)
    assert pending.groups is not None
    measured = pending.metrics | {"rollout_age": age(pending.groups, step)}
    certified = _hand_over(training, policy_version=step)
    following = submit_next(training, step + 1) if step + 1 < config.train.steps else None
    with run.clock.stage("reward"):
        groups = reward_groups(training.rewarder, pending.groups, run.layout)
    chosen = ChosenGroups(config.train, run.shape.vision.merge_unit)
    chosen = chosen.add(pending.draw.places, groups, run.layout.data_group)
    groups, metrics = learn(training, chosen, step)
    return groups, metrics | sum_metrics(measured) | certified, following


def submit_next(training: Training, step: int) -> PendingRollouts:
    """Draws the prompts of `step` and asks for their rollouts, of the weights that the engines have."""
    cursor = training.cursor
    with training.run.clock.stage("draw"):
        draw = draw_prompts_of(training, step)
    with training.run.clock.stage("generate"):
        _engines(training).submit(draw.prompts, sampling_of(training.run.config))
    return PendingRollouts(step, cursor, draw)


def wait_for(training: Training, pending: PendingRollouts) -> PendingRollouts:
    """With its rollouts, waited for."""
    if pending.groups is not None:
        return pending
    sampling = sampling_of(training.run.config)
    with training.run.clock.stage("generate"):
        groups = collect(training.run, _engines(training), pending.draw.prompts, sampling, policy_version=pending.step)
    return replace(pending, groups=tuple(groups), metrics=training.generator.take_metrics())


def _hand_over(training: Training, policy_version: int) -> Metrics:
    """Unless the engines have these weights; what their certificate measured."""
    if training.generator.policy_version == policy_version:
        return {}
    with training.run.clock.stage("hand over"):
        hand_over(training.run, training.generator, policy_version)
    return training.certifier.after_hand_over(policy_version)


def _engines(training: Training) -> RemoteGenerator:
    assert isinstance(training.generator, RemoteGenerator), "the settings say so"
    return training.generator


def _state(training: Training, pending: PendingRollouts | None) -> dict[str, Any]:
    """As if the prompts under way had not been drawn, and their rollouts beside it."""
    state = state_of(training)
    if pending is None:
        return state
    ahead = to_state(pending, training.run.layout.data_group)
    return state | {"cursor": pending.cursor.state_dict(), "ahead": ahead}


def _resume(training: Training, checkpoints: Checkpoints) -> PendingRollouts | None:
    """The first step's rollouts, where the checkpoint holds them. The engines get their weights when a step is left."""
    ahead = restore(training, checkpoints).get("ahead", {})
    step = checkpoints.next_step
    if step >= training.run.config.train.steps:
        return None
    kept = _kept(training, ahead, step) if ahead else None
    with training.run.clock.stage("hand over"):
        hand_over(training.run, training.generator, policy_version=step)
    training.certifier.start_or_stop(step)
    return kept


def _kept(training: Training, ahead: dict[str, Any], step: int) -> PendingRollouts | None:
    """Of a checkpoint; None, and nothing drawn, where other rollouts are wanted now."""
    cursor, config = training.cursor, training.run.config
    with training.run.clock.stage("draw"):
        draw = draw_prompts_of(training, step)
    try:
        groups = from_state(ahead, step, draw, config.train.group_size, training.run.processor.decode)
    except ValueError as error:  # the same on all ranks, who have all read the same
        warn(training.run, f"the checkpoint's rollouts of step {step} are made again: {error}")
        groups = None
    if groups is None:
        training.cursor = cursor
        return None
    return PendingRollouts(step, cursor, draw, groups)
