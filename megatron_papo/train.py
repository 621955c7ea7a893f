"""`papo train`: reinforcement learning with a perception term. The whole step is `train_step`; read it first.

    draw and mask prompts -> generate -> reward -> advantage -> pack -> score log-probs -> update -> hand weights over

Every rank runs this same program, except the ranks of separate engines, which serve it (`training/engine_rank.py`).
A stage is a plain function call over frozen values (`types.py`); what is distributed is hidden in the stages. From
`main` to the loss: `main -> train_step -> learn -> update_policy -> [Megatron's schedule] -> papo_loss`. What departs
from the paper is listed in docs/departures.md. `train_ahead.py` is the second driver, which samples one step ahead.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from megatron_papo.algorithm.advantages import with_advantages
from megatron_papo.algorithm.collapse_guard import CollapseGuard
from megatron_papo.algorithm.loss_settings import LossSettings
from megatron_papo.algorithm.losses import papo_loss
from megatron_papo.config import Config
from megatron_papo.data.bad_rows import BadRows
from megatron_papo.data.dataset import PromptDataset
from megatron_papo.data.draw import Draw
from megatron_papo.data.order import DataCursor
from megatron_papo.data.prefetch import Prefetch
from megatron_papo.distributed.exchange import sum_metrics
from megatron_papo.evaluate import NothingEvaluated, evaluate, open_heldout
from megatron_papo.generation import Generator, build_generator
from megatron_papo.model.policy import HeadRequest
from megatron_papo.observe.profiling import profiled
from megatron_papo.optimization.optimizer import Optimizer, build_optimizer, wrap_policy
from megatron_papo.optimization.pipeline import add_metrics, score_logprobs, update_policy
from megatron_papo.optimization.reference import ReferencePolicy
from megatron_papo.packing import joint_row
from megatron_papo.parity import Certifier
from megatron_papo.rewards import Rewarder
from megatron_papo.runtime.failures import RunStopped
from megatron_papo.runtime.stop_signal import StopSignal
from megatron_papo.training.batching import pack_update
from megatron_papo.training.checkpoints import Checkpoints
from megatron_papo.training.console import warn, warn_of_bad_rows, warn_of_missing_images, warn_of_skipped_updates
from megatron_papo.training.dynamic_sampling import ChosenGroups
from megatron_papo.training.engine_rank import serve, serves
from megatron_papo.training.long_rows import without_too_long
from megatron_papo.training.origin import Origin, origin_of
from megatron_papo.training.precision_guard import PrecisionGuard, watch_precision
from megatron_papo.training.prompt_source import open_training_rows, prefetch_prompts, resumed_cursor, sampling_of
from megatron_papo.training.recorder import Recorder, StepPlanner
from megatron_papo.training.rollouts import build_rewarder, generate, hand_over, reward_groups
from megatron_papo.training.session import Run, open_run
from megatron_papo.training.starting_weights import starting_reference
from megatron_papo.types import Batch, Group, Metrics


@dataclass
class Training:
    """All state of a training run beside the policy's weights; everything else in a step is a value."""

    run: Run
    """The policy on this rank, and everything else that all verbs need."""
    optimizer: Optimizer
    reference: ReferencePolicy | None
    """The frozen policy that the reference KL compares with; None where `loss.reference_coef` is 0."""
    generator: Generator
    """The engine that samples rollouts."""
    certifier: Certifier
    """Compares the engine's log-probs with the trainer's, as `certify` says."""
    rewarder: Rewarder
    prompts: Prefetch
    """Prepares the prompts of the next draw while this step trains."""
    heldout: PromptDataset | None
    """`data.eval`; None where there is none."""
    bad_rows: BadRows
    """Counts the rows of `data.train` that were left out."""
    cursor: DataCursor
    """Where the next draw begins."""
    origin: Origin
    """Fingerprints of the data and the model that the run began with."""
    guard: CollapseGuard
    precision: PrecisionGuard


def main(config: Config, planner: StepPlanner | None = None) -> int:
    """Trains up to `train.steps` steps, from the newest checkpoint under `run.dir` or else from `model`. Returns the
    exit code; raises RunStopped where a guard ends the run.

    `planner` predicts the seconds and the memory of every step, for the metrics `planned/...`.
    """
    if serves(config):
        return serve(config)
    with (
        StopSignal() as stop,
        open_run(config, config.generation.num_engine_ranks, records=True) as run,
        open_training(run) as training,
        Checkpoints(training.run, training.optimizer, "train", training.origin) as checkpoints,
    ):
        run, config = training.run, training.run.config  # now with the number of steps
        first_step, num_steps = _resume(training, checkpoints), config.train.num_steps
        if first_step < num_steps:
            training.certifier.start_or_stop(first_step)
        run.clock.take()  # the time until now belongs to no step
        with Recorder(run, first_step, num_steps, planner) as recorder:
            if first_step == 0 and evaluation_is_due(training, -1):
                recorder.record_start(evaluate_heldout(training))
            for step in range(first_step, num_steps):
                with profiled(config.observe, run.folder, run.layout.rank, step):
                    groups, metrics = train_step(training, step)
                scores = evaluate_heldout(training) if evaluation_is_due(training, step) else {}
                recorder.record(step, groups, metrics, scores)
                stopped = reason_to_stop(training, metrics)
                leaving = stop.requested()
                checkpoints.save_when_due(step, num_steps, state_of(training), scores, now=bool(stopped) or leaving)
                if stopped:
                    raise RunStopped(f"stopped the run after step {step}: {stopped}")
                if leaving:
                    return checkpoints.leave(step)
        checkpoints.export()
        return 0


def train_step(training: Training, step: int) -> tuple[list[Group], Metrics]:
    """Generates one rollout batch and trains on it. Returns the groups that were trained on, and the step's metrics."""
    run, config, clock = training.run, training.run.config, training.run.clock
    chosen = ChosenGroups.of(config, run.shape.vision.merge_unit)
    while not chosen.enough:
        with clock.stage("draw"):
            draw = draw_prompts_of(training, step)
        with clock.stage("generate"):
            groups = generate(run, training.generator, draw.prompts, sampling_of(config))
        with clock.stage("reward"):
            groups = reward_groups(run, training.rewarder, groups, step)
        chosen = chosen.add(draw.places, groups, run.layout.data_group)
    groups, metrics = learn(training, chosen, step)
    with clock.stage("hand_over"):
        hand_over(run, training.generator, policy_version=step + 1)
    metrics |= sum_metrics(training.generator.take_metrics())  # before the certifier's requests add to them
    return groups, metrics | training.certifier.after_hand_over(step + 1)


def learn(training: Training, chosen: ChosenGroups, step: int) -> tuple[list[Group], Metrics]:
    """The second half of a step, which both drivers share: one optimizer update for each chunk of the chosen groups.
    Returns the groups that were trained on, and the metrics."""
    run, config, clock = training.run, training.run.config, training.run.clock
    with clock.stage("advantage"):
        updates = [[with_advantages(group) for group in groups] for groups in chosen.by_update()]
    with clock.stage("pack"):
        updates = [without_too_long(run, groups, config.reads_joint_rows) for groups in updates]
        placeholder = next((group for groups in updates for group in groups), chosen.placeholder)
        batches = [pack_update(run, groups, placeholder, config.loss, config.reads_joint_rows) for groups in updates]
    with clock.stage("score"):
        metrics = _watch_precision(training, batches[0], step)
        unchanged = step == 0 and config.checkpoint.reference is None
        batches = score_logprobs(
            run.policy, batches, config, _head(run), training.reference, reference_is_policy=unchanged
        )
        run.meter.scored(batches)
    with clock.stage("update", total=len(batches)) as progress:
        settings = LossSettings.at_step(config, step, training.guard.factor)
        for number, batch in enumerate(batches):
            rows = _rows_with_gradient(batch, config)
            loss = partial(papo_loss, settings=replace(settings, first_update=number == 0))
            add_metrics(metrics, update_policy(training.optimizer, rows, _head(run), loss))
            run.meter.updated(rows)
            progress.advance()
    metrics["perception_coef"] = settings.perception_coef, 1.0
    warn_of_skipped_updates(run, training.optimizer.guard)
    return [group for groups in updates for group in groups], metrics | chosen.metrics


@contextmanager
def open_training(run: Run) -> Iterator[Training]:
    """The state of a training run as it starts, closed again at the end; the generator has no weights yet."""
    with ExitStack() as stack:
        with run.clock.stage("set_up"):
            run, dataset, cursor = open_training_rows(run)
            config = run.config
            warn_of_missing_images(run, dataset, perception=config.reads_masked_view)
            origin = origin_of(run, dataset, cursor)
            heldout = open_heldout(run) if config.data.eval is not None else None
            generator = build_generator(config, run.processor, run.layout, run.clock.report)
            stack.callback(generator.close)
            reference = None
            if config.loss.reference_coef > 0:  # before a resume: the reference is the policy as the run began
                reference = starting_reference(run.policy, run.shape, config.checkpoint.reference, run.layout)
            wrapped = wrap_policy(run.policy, config)
            optimizer = build_optimizer(wrapped, config, config.train.num_steps * config.train.updates_per_step)
        yield Training(
            run=run,
            optimizer=optimizer,
            reference=reference,
            generator=generator,
            certifier=Certifier(run, generator),
            rewarder=stack.enter_context(build_rewarder(run)),
            prompts=stack.enter_context(closing(prefetch_prompts(run, dataset))),
            heldout=heldout,
            bad_rows=BadRows(config.data.on_bad_row),
            cursor=cursor,
            origin=origin,
            guard=CollapseGuard(config.perception.guard),
            precision=PrecisionGuard.of(config.fp8),
        )


def draw_prompts_of(training: Training, step: int) -> Draw:
    """The next prompts of this rank, with their masked views where the loss reads them; moves the cursor on."""
    draw = training.prompts.take(training.cursor, step, training.bad_rows)
    training.cursor = draw.cursor
    warn_of_bad_rows(training.run, training.bad_rows, "train")
    return draw


def _head(run: Run) -> HeadRequest:
    """What the head computes for every response token."""
    config = run.config
    return HeadRequest(
        temperature=config.generation.temperature,
        full_entropy=config.entropy.kind == "full",
        full_kl=config.perception.kl == "full",
        banned_ids=run.banned_ids,
    )


def _rows_with_gradient(batch: Batch, config: Config) -> Batch:
    """The rows that the update computes: with both views where the gradient flows through both, else as they are."""
    if config.reads_joint_rows:
        return tuple(joint_row(row) for row in batch)
    return batch


def _watch_precision(training: Training, rows: Batch, step: int) -> Metrics:
    """Compares FP8 with `model.dtype` where that is due, before the step scores and updates. Returns the metrics."""
    run = training.run
    training.precision, metrics, reason = watch_precision(training.precision, run.policy, rows, _head(run), step)
    if reason:
        warn(run, reason)
    return metrics


def reason_to_stop(training: Training, metrics: Metrics) -> str:
    """The reason of the first guard that ends the run after this step; empty while it may go on."""
    collapse = watch_for_collapse(training, metrics)
    return training.certifier.reason_to_stop or collapse or training.optimizer.guard.reason_to_stop


def watch_for_collapse(training: Training, metrics: Metrics) -> str:
    """Gives the step's metrics to the guard against collapse. Returns its reason to stop, or an empty text."""
    training.guard, decision = training.guard.observe_step(metrics)
    if decision.action == "lower":
        warn(training.run, f"perception.guard lowered the coefficient: {decision.reason}")
    return f"perception.guard: {decision.reason}" if decision.action == "stop" else ""


def evaluation_is_due(training: Training, step: int) -> bool:
    """Whether the held-out set is evaluated after step `step` (from 0); -1 stands for the starting weights."""
    config, done = training.run.config.train, step + 1
    due = done == config.num_steps or (config.eval_every > 0 and done % config.eval_every == 0)
    return training.heldout is not None and (due if done else config.eval_at_start)


def evaluate_heldout(training: Training) -> dict[str, float]:
    """Evaluates the weights that the generator has. If every held-out row is bad, there are no scores but a warning:
    a run does not end because of data that it does not train on."""
    assert training.heldout is not None
    try:
        return evaluate(training.run, training.heldout, training.generator, training.rewarder, BadRows("skip"))
    except NothingEvaluated as error:
        warn(training.run, str(error))
        return {}


def state_of(training: Training) -> dict[str, Any]:
    """What a checkpoint keeps beside weights, optimizer state and random states, as plain JSON."""
    return {
        "cursor": training.cursor.state_dict(),
        "guard": training.guard.state(),
        "updates": training.optimizer.guard.state(),
        "precision": training.precision.state(),
    }


def restore(training: Training, checkpoints: Checkpoints) -> dict[str, Any]:
    """Loads the newest checkpoint when there is one. Returns the state saved with it, or an empty one."""
    state = checkpoints.resume()
    if state is not None:
        training.cursor = resumed_cursor(training.run, checkpoints, training.cursor, state["cursor"])
        training.guard = CollapseGuard.from_state(training.guard.config, state["guard"])
        training.optimizer.guard.load(state.get("updates", {}))
        training.precision = PrecisionGuard.from_state(training.precision.config, state.get("precision"))
    return state or {}


def _resume(training: Training, checkpoints: Checkpoints) -> int:
    """Loads the newest checkpoint and gives the generator its weights; the step to begin with."""
    restore(training, checkpoints)
    with training.run.clock.stage("hand_over"):
        hand_over(training.run, training.generator, policy_version=checkpoints.next_step)
    return checkpoints.next_step
