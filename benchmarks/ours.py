"""Our side: the package's own path from groups to an optimizer step, on one rank in this process.

One policy and one optimizer serve all variants; only what the step reads of the settings differs between them.
Banned tokens keep their probability, as in TRL; otherwise the sides would differ in the normaliser.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.models import MAX_PIXELS, MIN_PIXELS
from megatron_papo.algorithm.loss_settings import LossSettings
from megatron_papo.algorithm.losses import papo_loss
from megatron_papo.checkpoint.weight_loading import load_weights
from megatron_papo.config import Config, load_config
from megatron_papo.costs.flops import Meter
from megatron_papo.data.processor import load_processor
from megatron_papo.model.policy import HeadRequest, build_policy
from megatron_papo.model.shape import ModelShape
from megatron_papo.optimization.optimizer import Optimizer, build_optimizer, wrap_policy
from megatron_papo.optimization.pipeline import score, score_logprobs, update_policy
from megatron_papo.packing import joint_row
from megatron_papo.training.batching import pack_update
from megatron_papo.training.session import Run, open_run
from megatron_papo.types import Batch, Group, Metrics, MicroBatch

LEARNING_RATE = 1e-6
TOKENS_PER_MICRO_BATCH = 8192
KINDS: dict[str, dict[str, Any]] = {
    "GRPO": {"loss.perception_coef": 0},
    "PAPO frozen": {"perception.masked_branch": "frozen"},
    "PAPO joint": {"perception.masked_branch": "joint"},
}
"""The settings in which the variants differ."""
SETTINGS: dict[str, Any] = {
    "model.dtype": "float32",
    "data.instruction": "",
    "data.min_pixels": MIN_PIXELS,
    "data.max_pixels": MAX_PIXELS,
    "data.shuffle": False,
    "data.prefetch": False,  # one thread: drawing and masking count in the step that they are for
    "generation.top_p": 1.0,
    "loss.reference_coef": 0,
    "train.updates_per_step": 1,
    "train.tokens_per_micro_batch": TOKENS_PER_MICRO_BATCH,
    "optim.lr": LEARNING_RATE,
    "checkpoint.save_every": 0,
    "checkpoint.export_at_end": False,
    "observe.console": False,
    "observe.tensorboard": False,
}
HEAD = HeadRequest(banned_ids=())

Key = tuple[str, int]
"""Prompt id and rollout index."""


def settings(folder: Path, kind: str, **more: Any) -> Config:
    """The settings of one of `KINDS` for the model in `folder`/model; `more` are keys with `__` for the dot."""
    paths = {"run.dir": folder / "run", "model.path": folder / "model"}
    wanted = SETTINGS | paths | KINDS[kind] | {key.replace("__", "."): value for key, value in more.items()}
    return load_config(None, [f"{key}={value}" for key, value in wanted.items()])


@dataclass(frozen=True)
class Ours:
    run: Run
    optimizer: Optimizer
    configs: dict[str, Config]

    def update(self, kind: str, groups: Sequence[Group], old: dict[Key, Tensor] | None = None) -> Metrics:
        """Packs the groups, scores what `kind` needs, and takes one optimizer step.

        `old`: log-probs of an earlier policy by rollout; without them the update is on-policy.
        """
        config = self.configs[kind]
        run = replace(self.run, config=config)
        batch = pack_update(run, groups, groups[0], config.loss, config.reads_joint_rows)
        (batch,) = score_logprobs(run.policy, [batch], config, HEAD, None)
        if old is not None:
            batch = tuple(replace(row, old_logprobs_R=_gather(row, old)) for row in batch)
        rows = [joint_row(row) for row in batch] if config.reads_joint_rows else batch
        loss = partial(papo_loss, settings=LossSettings.at_step(config, step=0))
        return update_policy(self.optimizer, tuple(rows), HEAD, loss)

    def logprobs(self, groups: Sequence[Group]) -> dict[Key, Tensor]:
        """Log-probs of the response tokens of every rollout."""
        batch: Batch = pack_update(self.run, groups, groups[0], self.run.config.loss)
        outputs = score(self.run.policy, batch, HEAD)
        return {
            key: values_R
            for row, output in zip(batch, outputs, strict=True)
            for key, values_R in _by_rollout(row, output.policy_logprobs_R).items()
        }

    def reset(self) -> None:
        """Loads the weights of the folder again."""
        load_weights(self.run.policy, self.run.shape, self.run.processor.folder)


@contextmanager
def open_ours(folder: Path) -> Iterator[Ours]:
    """A context with all variants on the model in `folder`/model; it ends the process groups at its end."""
    configs = {kind: settings(folder, kind) for kind in KINDS}
    with open_run(configs["GRPO"]) as run:
        yield _of_run(run, configs)


def beside(other: Ours, folder: Path) -> Ours:
    """The same on the model in `folder`/model, in the process groups of `other`."""
    configs = {kind: settings(folder, kind) for kind in KINDS}
    config, shape = configs["GRPO"], ModelShape.from_folder(folder / "model")
    policy = build_policy(config, shape)
    load_weights(policy, shape, folder / "model")
    processor = load_processor(folder / "model", config.data)
    run = replace(other.run, config=config, shape=shape, processor=processor, meter=Meter(shape), policy=policy)
    return _of_run(run, configs)


def _of_run(run: Run, configs: dict[str, Config]) -> Ours:
    return Ours(run, build_optimizer(wrap_policy(run.policy, run.config), run.config, num_updates=1000), configs)


def _by_rollout(row: MicroBatch, values_R: Tensor) -> dict[Key, Tensor]:
    return {key: values_R[row.rollout_index_R == index] for index, key in enumerate(row.sequences)}


def _gather(row: MicroBatch, by_rollout: dict[Key, Tensor]) -> Tensor:
    """The rollouts' values as one tensor, [R], in the order of the row."""
    values_R = row.weights_R.new_empty(row.weights_R.shape)
    for index, key in enumerate(row.sequences):
        values_R[row.rollout_index_R == index] = by_rollout[key]
    return values_R
