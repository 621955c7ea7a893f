"""`papo train` with `train.ahead`: the engines sample the rollouts of the next step while this one trains.

This is the second driver; its stages are those of `train.py` in another order. Rollouts of step k are sampled with the
weights that step k - 1 began with, so they are one step old when they are trained on (those of the first step are not).
`loss.correction` accounts for that, by the ratio of the log-probs that the trainer recomputes to those that the engine
reported. A checkpoint waits for the pending rollouts and holds them, so that an interrupted run goes on as if it had
not been interrupted. Left out: more than one step ahead; dynamic sampling, which does not know beforehand how many
prompts it will need.
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
from megatron_papo.training.prompt_source import sampling_of
from megatron_papo.training.recorder import Recorder, StepPlanner
from megatron_papo.training.rollouts import collect, hand_over, reward_groups
from megatron_papo.training.session import open_run
from megatron_papo.types import Group, Metrics


def main(config: Config, planner: StepPlanner | None = None) -> int:
    """Does what `train.main` does, one step ahead."""
    if serves(config):
        return serve(config)
    with (
        StopSignal() as stop,
        open_run(config, config.generation.num_engine_ranks, records=True) as run,
        open_training(run) as training,
        Checkpoints(training.run, training.optimizer, "train", training.origin) as checkpoints,
    ):
        run, num_steps = training.run, training.run.config.train.num_steps
        pending, first_step = _resume(training, checkpoints), checkpoints.next_step
        run.clock.take()  # the time until now belongs to no step
        with Recorder(run, first_step, num_steps, planner) as recorder:
            if first_step == 0 and evaluation_is_due(training, -1):
                recorder.record_start(evaluate_heldout(training))
            if pending is None and first_step < num_steps:
                pending = submit_next(training, first_step)
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
                leaving = stop.requested()
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
    """Waits for the rollouts of a step, submits the prompts of the next one, and trains on the former.

    Returns what `train.train_step` does, and the rollouts that are now pending: None after the last step.
    """
    run, config, step = training.run, training.run.config, pending.step
    pending = wait_for(training, pending)
    assert pending.groups is not None
    rollout_metrics = pending.metrics | {"rollout_age": age(pending.groups, step)}
    certificate_metrics = _hand_over(training, policy_version=step)
    next_pending = submit_next(training, step + 1) if step + 1 < config.train.num_steps else None
    with run.clock.stage("reward"):
        groups = reward_groups(run, training.rewarder, pending.groups, step)
    chosen = ChosenGroups.of(config, run.shape.vision.merge_unit)
    chosen = chosen.add(pending.draw.places, groups, run.layout.data_group)
    groups, metrics = learn(training, chosen, step)
    return groups, metrics | sum_metrics(rollout_metrics) | certificate_metrics, next_pending


def submit_next(training: Training, step: int) -> PendingRollouts:
    """Draws the prompts of `step` and submits them to the engines, which sample with the weights that they have."""
    cursor = training.cursor
    with training.run.clock.stage("draw"):
        draw = draw_prompts_of(training, step)
    with training.run.clock.stage("generate"):
        _engines(training).submit(draw.prompts, sampling_of(training.run.config))
    return PendingRollouts(step, cursor, draw)


def wait_for(training: Training, pending: PendingRollouts) -> PendingRollouts:
    """The same rollouts, collected: waits until the engines have sampled all of them."""
    if pending.groups is not None:
        return pending
    sampling = sampling_of(training.run.config)
    with training.run.clock.stage("generate"):
        groups = collect(training.run, _engines(training), pending.draw.prompts, sampling, policy_version=pending.step)
    return replace(pending, groups=tuple(groups), metrics=training.generator.take_metrics())


def _hand_over(training: Training, policy_version: int) -> Metrics:
    """Gives the engines the policy's weights unless they have them already; what the certificate measured of them."""
    if training.generator.policy_version == policy_version:
        return {}
    with training.run.clock.stage("hand_over"):
        hand_over(training.run, training.generator, policy_version)
    return training.certifier.after_hand_over(policy_version)


def _engines(training: Training) -> RemoteGenerator:
    """The run's generator, by the type that has `submit` and `collect`."""
    assert isinstance(training.generator, RemoteGenerator), "the settings say so"
    return training.generator


def _state(training: Training, pending: PendingRollouts | None) -> dict[str, Any]:
    """What a checkpoint keeps: the state as if the pending prompts had not been drawn, and their rollouts beside it."""
    state = state_of(training)
    if pending is None:
        return state
    rollouts = to_state(pending, training.run.layout.data_group)
    return state | {"cursor": pending.cursor.state_dict(), "ahead": rollouts}


def _resume(training: Training, checkpoints: Checkpoints) -> PendingRollouts | None:
    """Loads the newest checkpoint and, where a step is left to train, gives the engines its weights; the pending
    rollouts that the checkpoint holds, if any."""
    saved = restore(training, checkpoints).get("ahead", {})
    step = checkpoints.next_step
    if step >= training.run.config.train.num_steps:
        return None
    pending = _restore_pending(training, saved, step) if saved and not checkpoints.data_changed else None
    with training.run.clock.stage("hand_over"):
        hand_over(training.run, training.generator, policy_version=step)
    training.certifier.start_or_stop(step)
    return pending


def _restore_pending(training: Training, saved: dict[str, Any], step: int) -> PendingRollouts | None:
    """The rollouts that a checkpoint holds; None where this run needs others, and its prompts are then drawn again."""
    cursor, config = training.cursor, training.run.config
    with training.run.clock.stage("draw"):
        draw = draw_prompts_of(training, step)
    try:
        groups = from_state(saved, step, draw, config.train.group_size, training.run.processor.decode)
    except ValueError as error:  # every rank has read the same, so it is raised on all of them
        warn(training.run, f"the checkpoint's rollouts of step {step} are made again: {error}")
        groups = None
    if groups is None:
        training.cursor = cursor
        return None
    return PendingRollouts(step, cursor, draw, groups)
