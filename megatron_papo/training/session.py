"""What every verb needs while it runs: settings, ranks, model, processor and clock, built in one place by `open_run`.

`open_run` also closes everything again, after a failure too. Leaves out what changes weights, such as the optimizer and
its schedule, which belong to the verbs that train.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import transformers.models.auto.processing_auto  # noqa: F401 (see `FAMILIES` below)

from megatron_papo.checkpoint.weight_loading import check_weights
from megatron_papo.config import Config, dump_config
from megatron_papo.config.derived import model_folder, weights_folder
from megatron_papo.costs.flops import Meter
from megatron_papo.costs.row_limit import longest_row
from megatron_papo.data.processor import Processor, load_processor
from megatron_papo.distributed.accelerator import adapt_megatron, has_gpu, seed_all
from megatron_papo.distributed.exchange import gather_objects
from megatron_papo.distributed.layout import Layout, initialize, own_rank, shutdown, world_group
from megatron_papo.distributed.megatron_warnings import quieten_megatron
from megatron_papo.distributed.rendezvous import world_store
from megatron_papo.generation.remote.run_key import offered_key
from megatron_papo.model.family import FAMILIES, family_named
from megatron_papo.model.policy import VisionLanguageModel, build_policy
from megatron_papo.model.shape import ModelShape, check_layout
from megatron_papo.observe.clock import StageClock
from megatron_papo.observe.sinks import print_warning
from megatron_papo.observe.wandb_run import WandbRun
from megatron_papo.runtime.garbage_collector import present_objects_skipped
from megatron_papo.runtime.heartbeat import Heartbeat
from megatron_papo.training.starting_weights import load_starting_weights

for _model_type in FAMILIES:
    # Once, in the process that local ranks are forked from. Else transformers would import its files of a family on
    # first use, in each rank again, which takes longer than the first step of a small run. Families that are installed
    # apart are imported when they are asked for.
    family_named(_model_type).module("transformers_classes")


@dataclass(frozen=True)
class Run:
    """One rank's part of a run. It holds no state of training beside the policy's weights."""

    config: Config
    layout: Layout
    shape: ModelShape
    processor: Processor
    clock: StageClock
    meter: Meter
    policy: VisionLanguageModel
    """The model of this pipeline stage; its weights change in place."""
    wandb_run: WandbRun | None = None
    """The run in wandb, on the writer of a run that records its steps there."""
    counts: dict[str, int] = field(default_factory=lambda: {"checkpoints_failed": 0, "engine_restarts": 0})
    """How often something has gone wrong so far without ending the run; the writer's numbers count for all ranks."""
    said: set[str] = field(default_factory=set)
    """What is said once in a run, and has been."""

    @property
    def folder(self) -> Path:
        """The folder under which the run writes everything."""
        return self.config.run.dir

    @property
    def is_writer(self) -> bool:
        """Whether this is the one rank that writes what belongs to the whole run, such as its metrics."""
        return self.layout.rank == 0

    @cached_property
    def longest_row(self) -> int:
        """Most tokens of a row that holds a prompt which has no room within `train.tokens_per_micro_batch`."""
        return longest_row(self.config, self.shape, self.layout.world_size, on_gpus=has_gpu())

    @property
    def banned_ids(self) -> tuple[int, ...]:
        """Tokens that neither engine nor trainer gives any probability: vision placeholders, and rows of the vocabulary
        that the tokenizer has no token for."""
        return self.shape.banned_ids(self.processor.num_words)


def _end_groups(kind: type[BaseException] | None, *_: object) -> None:
    """Ends the process groups, except after a failure on a GPU: NCCL may then wait for peers that wait for this rank,
    and the note of its failure is written only afterwards."""
    if kind is None or not has_gpu():
        shutdown()


@contextmanager
def open_run(config: Config, num_engine_ranks: int = 0, *, records: bool = False) -> Iterator[Run]:
    """Joins the ranks and loads model and processor of `config.model`; ends the process groups afterwards.

    `num_engine_ranks`: how many of the started ranks, the last ones, belong to separate engines. `records`: whether the
    run records its steps, to wandb too, which is opened first: a missing key is told before the model loads. Raises
    ValueError that names the setting or the folder where the model cannot be used.
    """
    folder = model_folder(config)
    quieten_megatron()
    adapt_megatron()
    with ExitStack() as stack:
        clock = stack.enter_context(StageClock(config.run, own_rank(), config.observe.console))
        heartbeat = stack.enter_context(Heartbeat(config.run, own_rank(), clock.running))
        wandb_run = _open_wandb(config) if records and own_rank() == 0 else None
        if wandb_run:
            stack.enter_context(wandb_run)
        with clock.stage("join"):
            layout = initialize(config.parallel, num_engine_ranks)
            heartbeat.met(gather_objects(uuid.uuid4().hex, world_group())[0])
        stack.push(_end_groups)
        if num_engine_ranks and layout.rank == 0:
            stack.enter_context(offered_key(config.run.dir, world_store(config.parallel.timeout_s)))
        shape = ModelShape.from_folder(folder)
        check_layout(config, shape, layout.world_size)
        seed_all(config.run.seed)
        with clock.stage("load"):
            processor = load_processor(folder, config.data)
            _check_patches(processor, shape)
            check_vocabulary(processor, shape)
            has_weights = config.model.checkpoint is not None or not config.model.random_init
            if has_weights:
                check_weights(shape, weights_folder(config))
            policy = build_policy(config, shape)
            if has_weights:
                load_starting_weights(policy, shape, weights_folder(config), layout)
        with present_objects_skipped():
            yield Run(config, layout, shape, processor, clock, Meter(shape), policy, wandb_run)


def _open_wandb(config: Config) -> WandbRun | None:
    """The run in wandb where `observe.wandb` asks for one; this rank is the writer."""
    if config.observe.wandb == "off":
        return None
    return WandbRun(config.observe, config.run, dump_config(config), print_warning)


def _check_patches(processor: Processor, shape: ModelShape) -> None:
    """Raises ValueError where the image processor makes patches of another size than the vision tower takes."""
    for name, theirs in shape.vision.patch_sizes.items():
        found = getattr(processor.image_processor, name)
        if found != theirs:
            raise ValueError(
                f"model.path: the image processor of {processor.folder} has {name} {found}, its config.json {theirs}"
            )


def check_vocabulary(processor: Processor, shape: ModelShape) -> None:
    """Raises ValueError where a token of the tokenizer has no row in the model's vocabulary, where its image token is
    another than the model's, and where the chat template loses part of a prompt."""
    vocab_size, where = shape.language.vocab_size, f"model.path: {processor.folder}"
    if processor.num_words > vocab_size:
        raise ValueError(f"{where}: tokenizer has {processor.num_words} words, vocab_size is {vocab_size}")
    if processor.image_token_id != shape.image_token_id:
        raise ValueError(
            f"{where}: image_token_id is {shape.image_token_id} in config.json, {processor.image_token_id} in the "
            "tokenizer"
        )
    _ = processor.form
