"""What a verb holds while it runs: policy, processor, clock and meter of this rank; and what all verbs do alike.

`open_run` builds it in one place and takes it down again, also when a rank fails. What changes weights (optimizer,
schedule) belongs to the verbs that train.
"""

from __future__ import annotations

import gc
import logging
import uuid
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

# Imported here, in the process that local ranks are forked from: transformers would import them on first use, in every
# rank anew, which takes longer than a small run's first step.
import transformers.models.auto.processing_auto
import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl
import transformers.models.qwen2_vl.image_processing_qwen2_vl
import transformers.models.qwen2_vl.video_processing_qwen2_vl  # noqa: F401

from megatron_papo.checkpoint.state_file import names_checkpoint
from megatron_papo.checkpoint.weight_loading import check_weights, load_weights
from megatron_papo.config import Config, ConfigError, LossConfig
from megatron_papo.costs.flops import Meter, group_flops
from megatron_papo.data.processor import Processor, load_processor
from megatron_papo.distributed.accelerator import adapt_megatron, has_gpu, seed_all
from megatron_papo.distributed.exchange import gather_objects, move_items
from megatron_papo.distributed.layout import Layout, initialize, own_rank, shutdown, world_group
from megatron_papo.distributed.rendezvous import world_store
from megatron_papo.files.small_files import print_warning
from megatron_papo.generation import Generator
from megatron_papo.generation.remote.run_key import offered_key
from megatron_papo.model.family import family_of
from megatron_papo.model.policy import VisionLanguageModel, build_policy
from megatron_papo.model.shape import ModelShape, check_layout
from megatron_papo.observe.clock import StageClock
from megatron_papo.optimization.reference import ReferencePolicy
from megatron_papo.packing import Cost, Totals, balance, empty_like, pack, sum_totals, token_totals, whole
from megatron_papo.rewards import Rewarder
from megatron_papo.runtime.heartbeat import Heartbeat
from megatron_papo.text.untrusted import as_text
from megatron_papo.types import Batch, Group
from megatron_papo.weights import first_look
from megatron_papo.weights.held import held_parameters
from megatron_papo.weights.transfer import hf_tensors
from megatron_papo.weights.weight_files import weight_files

_SLOTS_PER_STAGE = 2
"""A pipeline gets at least this many rows a stage, as far as there are prompts: with p stages and m rows it stands
still for (p - 1) / (m + p - 1) of the time."""


@dataclass(frozen=True)
class Run:
    config: Config
    layout: Layout
    shape: ModelShape
    processor: Processor
    clock: StageClock
    meter: Meter
    policy: VisionLanguageModel
    """This pipeline stage's model; its weights change in place."""
    counts: dict[str, int] = field(default_factory=lambda: {"checkpoints_failed": 0, "engine_restarts": 0})
    """What has gone wrong so far without ending the run; on the writer what it says holds for all ranks."""

    @property
    def folder(self) -> Path:
        return self.config.run.dir

    @property
    def is_writer(self) -> bool:
        """The one rank that writes what the whole run has in common."""
        return self.layout.rank == 0

    @property
    def banned_ids(self) -> tuple[int, ...]:
        """Tokens that neither engine nor trainer gives any probability: vision placeholders and padded words."""
        return self.shape.banned_ids(self.processor.num_words)


def _end_groups(kind: type[BaseException] | None, *_: object) -> None:
    """After a failure on a GPU the groups are left to the end of the process: NCCL may wait there for peers that wait
    for this rank, and the note of its failure is written only afterwards."""
    if kind is None or not has_gpu():
        shutdown()


@contextmanager
def open_run(config: Config, num_engine_ranks: int = 0) -> Iterator[Run]:
    """Ranks, model and processor of `config.model`, with the weights loaded; ends the process groups afterwards.

    `num_engine_ranks`: of those that were started, the last ones are engines'.
    """
    folder = model_folder(config)
    _quieten_megatron()
    adapt_megatron()
    with ExitStack() as stack:
        clock = stack.enter_context(StageClock(config.run, own_rank(), config.observe.console))
        heartbeat = stack.enter_context(Heartbeat(config.run, own_rank(), clock.running))
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
            check_words(processor, shape)
            has_weights = config.model.checkpoint is not None or not config.model.random_init
            if has_weights:
                check_weights(shape, config.model.checkpoint or folder)
            policy = build_policy(config, shape)
            if has_weights:
                _load(policy, shape, Path(config.model.checkpoint or folder), layout)
        with _left_alone_by_the_collector():
            yield Run(config, layout, shape, processor, clock, Meter(shape), policy)


def _load(policy: VisionLanguageModel, shape: ModelShape, folder: Path, layout: Layout) -> None:
    """Weights from a folder of either kind; those of a Hugging Face folder are looked at once more."""
    load_weights(policy, shape, folder)
    if names_checkpoint(folder):
        return
    first_look.look(folder, shape, held_parameters(policy, shape, layout.tensor_size), layout.tensor_rank)
    note = weight_files(folder).note()
    if note and layout.rank == 0:
        print_warning(as_text(note))


def _check_patches(processor: Processor, shape: ModelShape) -> None:
    """Raises ValueError where the image processor cuts other patches than the vision tower takes."""
    settings, vision = processor.image_processor, shape.vision
    for name, theirs in (
        ("patch_size", vision.patch_size),
        ("temporal_patch_size", vision.temporal_patch_size),
        ("merge_size", vision.spatial_merge_size),
    ):
        if getattr(settings, name) != theirs:
            raise ValueError(
                f"model.path: the image processor of {processor.folder} has {name} {getattr(settings, name)}, its "
                f"config.json {theirs}"
            )


def check_words(processor: Processor, shape: ModelShape) -> None:
    """Raises ValueError where a token of the tokenizer has no row in the vocabulary or another meaning, and for a chat
    template that loses what it is given."""
    vocab_size, where = shape.language.vocab_size, f"model.path: {processor.folder}"
    if processor.num_words > vocab_size:
        raise ValueError(f"{where}: tokenizer has {processor.num_words} words, vocab_size is {vocab_size}")
    if processor.image_token_id != shape.image_token_id:
        raise ValueError(
            f"{where}: image_token_id is {shape.image_token_id} in config.json, {processor.image_token_id} in the "
            "tokenizer"
        )
    _ = processor.form


@contextmanager
def _left_alone_by_the_collector() -> Iterator[None]:
    """What is there as a run begins, libraries above all, is not looked through again: a pass over it holds every
    thread up for a third of a second, and a save makes enough objects to cause one."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _quieten_megatron() -> None:
    """Megatron-Core remarks on its own experimental parts and on what is not installed; `papo doctor` says the latter
    once, in words of what it costs. Its distributed optimizer adds what only its own authors can change."""
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    logging.getLogger("megatron.core.rerun_state_machine").setLevel(logging.ERROR)
    ddp = logging.getLogger("megatron.core.distributed.distributed_data_parallel")
    ddp.addFilter(lambda record: "full_param_layout not provided" not in record.getMessage())
    deprecated = r"`torch\.distributed\.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated"
    warnings.filterwarnings("ignore", message=deprecated, category=FutureWarning)
    # said of Megatron's own lines too, but without a GPU they come by way of our adaptation
    not_a_leaf = r"The \.grad attribute of a Tensor that is not a leaf Tensor is being accessed"
    warnings.filterwarnings("ignore", message=not_a_leaf, module=r"megatron_papo\.accelerator")


def model_folder(config: Config) -> Path:
    """Where config.json, tokenizer and processor lie: the Hugging Face folder or the Megatron checkpoint."""
    folder = config.model.path or config.model.checkpoint
    if folder is None:
        raise ConfigError("model.path: names no folder")
    return folder


def starting_reference(run: Run) -> ReferencePolicy:
    """The reference policy: the weights of `checkpoint.reference`, by default those the policy has now."""
    folder = run.config.checkpoint.reference
    if folder is None:
        return ReferencePolicy(run.policy)
    own = ReferencePolicy(run.policy)
    _load(run.policy, run.shape, folder, run.layout)
    reference = ReferencePolicy(run.policy)
    own.copy_into(run.policy)
    return reference


def give_weights(run: Run, generator: Generator, policy_version: int) -> None:
    """Gives the generator the policy's weights as they are now."""
    bucket_bytes = run.config.generation.bucket_mib * 2**20
    tensors = hf_tensors(run.policy, run.shape, module_names=True, bucket_bytes=bucket_bytes)
    generator.load_weights(tensors, policy_version)


def reward_groups(rewarder: Rewarder, groups: Sequence[Group], layout: Layout) -> list[Group]:
    """The groups with their rewards, each asked for once: the ranks of a model-parallel group share the work, so that
    a verdict that ran into its time limit is the same for all of them."""
    size, rank = layout.model_group.size(), layout.model_group.rank()
    own = [(group.rewards, group.reward_parts) for group in rewarder.reward(groups[rank::size])]
    shares = gather_objects(own, layout.model_group)
    return [
        replace(group, rewards=rewards, reward_parts=parts)
        for index, group in enumerate(groups)
        for rewards, parts in [shares[index % size][index // size]]
    ]


def pack_rows(
    run: Run, groups: Sequence[Group], totals: Totals | None = None, loss: LossConfig | None = None, joint: bool = False
) -> Batch:
    """The groups as rows under the token budget; weights are shares of the mean over `totals`, or over these alone.

    `loss`: how its means are taken; by default token means. `joint`: leave room for the masked view in every row.
    """
    return pack(
        groups,
        tokens_per_micro_batch=run.config.train.tokens_per_micro_batch,
        loss=loss or LossConfig(),
        totals=totals or token_totals(groups),
        joint=joint,
        cost=_group_cost(run),
        least_rows=_SLOTS_PER_STAGE * run.layout.pipeline_size if run.layout.pipeline_size > 1 else 1,
        positions=partial(family_of(run.shape).positions.prompt_positions, shape=run.shape),
        banned_ids=run.banned_ids,
    )


def pack_update(
    run: Run, groups: Sequence[Group], spare: Group, loss: LossConfig | None = None, joint: bool = False
) -> Batch:
    """The micro-batches of one optimizer step; weights are shares of the mean over all data-parallel ranks.

    Groups first move between data-parallel ranks until all have as much to compute. A rank without groups packs
    `spare` with weights of zero, so that it takes part in the update all the same.
    """
    groups = _balanced(run, groups, joint)
    totals = sum_totals(gather_objects(token_totals(groups), run.layout.data_group))
    if groups:
        return pack_rows(run, groups, totals, loss, joint)
    idle = replace(spare, advantages=(0.0,) * len(spare.rollouts))
    return tuple(empty_like(row) for row in pack_rows(run, [idle], totals, loss, joint))


def _balanced(run: Run, groups: Sequence[Group], joint: bool) -> Sequence[Group]:
    if run.layout.data_size == 1:
        return groups
    costs = [whole(group, joint).cost(_group_cost(run)) for group in groups]
    moves = balance(gather_objects(costs, run.layout.data_group))
    return move_items(groups, moves, run.layout.data_group)


def _group_cost(run: Run) -> Cost:
    """FLOPs of a prompt with its responses, whichever pass they go through: only ratios matter."""
    return lambda prompt, responses, grids: group_flops(prompt, responses, grids, run.shape).total
