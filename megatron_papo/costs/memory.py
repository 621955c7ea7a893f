"""What a run needs of a GPU's memory, stage by stage, from the model's shape and the settings: before any rank starts.

`stage_memory` is the one account of it: `papo check` prints it, the planner chooses layouts by it. Weights, gradients,
optimizer states and the engine's share are counted, and what of these cannot fit is refused. Activations are counted
for rows that are full (full_rows.py), so they are said and warned of, never refused. CUDA, NCCL and the allocator take
memory for themselves, of which a reserve is kept beside activations. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megatron_papo.config import Config, FreezeConfig
from megatron_papo.config.derived import engine_weight_bytes
from megatron_papo.costs.activations import RowSize, held_bytes
from megatron_papo.costs.full_rows import ASSUMED_SHARES, RowShares, full_row, rows_in_flight
from megatron_papo.costs.hardware import GPUS
from megatron_papo.distributed.rank_arithmetic import data_ranks
from megatron_papo.model.layer_costs import ParameterCount, Part, costs_of, language_layer
from megatron_papo.model.shape import ModelShape, padded, stage_layers

GIB = 2**30
_CUDA_TAKES = GIB
"""The least that CUDA's context, NCCL and the allocator take of a GPU for themselves."""
RESERVE_BYTES = 6 * GIB
"""Bytes of every GPU that are left beside activations to CUDA, NCCL's buffers and the allocator's losses."""


@dataclass(frozen=True)
class StageMemory:
    """Bytes on one GPU of a pipeline stage."""

    stage: int
    weights: int
    gradients: int
    """In fp32, whole on every data-parallel rank."""
    optimizer: int
    """Adam's two moments and, beside bfloat16 weights, the fp32 master copy; what is offloaded left out."""
    engine: int
    """Generation's share, beside the three above."""
    engine_sleeps: bool
    """Whether it is given back while the policy trains."""
    activations: int
    """Estimated, for one pipeline's rows in flight."""

    @property
    def states(self) -> int:
        """What the trainer keeps between two updates."""
        return self.weights + self.gradients + self.optimizer

    @property
    def counted(self) -> int:
        return self.states + self.engine

    @property
    def total(self) -> int:
        """At the fullest moment: rollouts, with the engine awake and no activations, or an update while it sleeps."""
        return max(self.counted, self.updating)

    @property
    def training(self) -> int:
        """An update's own, the engine left out."""
        return self.states + self.activations

    @property
    def updating(self) -> int:
        """During an update, beside the engine where that does not sleep."""
        return self.training + (0 if self.engine_sleeps else self.engine)

    def parts(self, *names: str) -> str:
        """The parts of these names, or all but the activations, with their GiB."""
        names = names or ("weights", "gradients", "optimizer", "engine")
        return ", ".join(f"{name} {getattr(self, name) / GIB:.1f}" for name in names)


def stage_parameters(
    shape: ModelShape, layers: tuple[int, ...], width: Callable[[int], int] = lambda width: width
) -> list[list[ParameterCount]]:
    """The pieces of the model on each of the stages, which have so many language layers; `width` pads FFN widths and
    the vocabulary, as `padded` does."""
    language = shape.language
    layer = language_layer(shape)
    matrix = ParameterCount("language", width(language.vocab_size) * language.hidden_size, 0)
    stages = [[layer.parameters("language", num_layers, width)] for num_layers in layers]
    stages[0] += [*costs_of(shape).vision_parameters(shape, width), matrix]
    stages[-1].append(ParameterCount("language", 0, layer.norm_parameters))
    if not shape.tie_word_embeddings or len(layers) > 1:  # a tied matrix lies on the first stage and on the last
        stages[-1].append(matrix)
    return stages


def num_parameters(shape: ModelShape) -> int:
    """The number of parameters of the whole model without padding, a tied matrix once: what a checkpoint stores."""
    (pieces,) = stage_parameters(shape, (shape.language.num_layers,))
    return sum(piece.split + piece.whole for piece in pieces)


def stage_memory(
    config: Config, shape: ModelShape, num_ranks: int, shares: RowShares = ASSUMED_SHARES
) -> tuple[StageMemory, ...]:
    """The memory of a GPU of every pipeline stage, on `num_ranks` trainer ranks, each with a GPU to itself; activations
    are those of full rows of such shares."""
    parallel = config.parallel
    data = data_ranks(parallel, num_ranks)
    stays = 1.0 - config.optim.offload_fraction
    stages = []
    pieces_of_stages = stage_parameters(
        shape, stage_layers(parallel, shape), lambda width: padded(width, parallel.tensor)
    )
    for stage, pieces in enumerate(pieces_of_stages):
        on_rank = [(piece.part, piece.on_a_rank(parallel.tensor)) for piece in pieces]
        parameters = sum(number for _, number in on_rank)
        trained = sum(number for part, number in on_rank if not frozen(part, config.model.freeze))
        states = int(trained * state_bytes(config) * stays)
        stages.append(
            StageMemory(
                stage=stage,
                weights=parameters * weight_bytes(config),
                gradients=trained * 4,
                optimizer=states // data if parallel.distributed_optimizer else states,
                engine=_engine(config, shape),
                engine_sleeps=config.generation.engine == "vllm" and config.generation.sleep,
                activations=activation_bytes(config, shape, stage, data, shares),
            )
        )
    return tuple(stages)


@dataclass(frozen=True)
class UpdateBytes:
    """Bytes of an update of given rows on one GPU: what stays between updates, and the peaks of its two halves."""

    states: int
    passes: int
    """The peak of forward and backward."""
    step: int
    """The peak of the optimizer's step: its Adam works in place, one kernel for all."""


def update_bytes(config: Config, shape: ModelShape, row: RowSize, *, num_ranks: int, stage: int = 0) -> UpdateBytes:
    """The bytes of an update of rows of that size on a GPU of pipeline stage `stage`; traced in
    tests/cuda/test_update.py."""
    memory = stage_memory(config, shape, num_ranks)[stage]
    states = memory.states
    held = held_bytes(config, shape, stage, row, config.parallel.pipeline - stage, fused=config.model.spec != "local")
    return UpdateBytes(states, states + held, states)


def gpu_bytes(config: Config) -> int | None:
    """The memory of one GPU of `cluster.gpu` in bytes; None where nothing is known of it."""
    gpu = GPUS.get(config.cluster.gpu)
    gib = config.cluster.gpu_memory_gib or (gpu.memory_gib if gpu else None)
    return None if gib is None else int(gib * GIB)


def memory_faults(config: Config, shape: ModelShape, num_ranks: int) -> list[str]:
    """A line for every stage that certainly cannot fit, and for an engine whose share does not hold its weights."""
    has = gpu_bytes(config)
    if has is None:
        known = ", ".join(GPUS)
        return [f"cluster.gpu: {config.cluster.gpu} is none of {known}; cluster.gpu_memory_gib says what it has"]
    name = f"{config.cluster.gpu} has {has / GIB:.1f}"
    stages, wakes = stage_memory(config, shape, num_ranks), _engine_wakes(config)
    faults = [
        f"cluster: stage {stage.stage} needs {stage.counted / GIB:.1f} GiB a GPU ({stage.parts()}), {name}"
        for stage in stages
        if stage.counted - (stage.engine if wakes else 0) > has
    ]
    if wakes and not faults:
        faults += _waking_faults(config, shape, max(stages, key=lambda stage: stage.counted), has)
    weights, share = _engine_weights(config, shape), _engine_share(config, shape)
    if weights > share:
        faults.append(
            f"generation.gpu_memory_fraction: {config.generation.gpu_memory_fraction} of {has / GIB:.1f} GiB is "
            f"{share / GIB:.1f}, the engine's weights alone take {weights / GIB:.1f} (generation.tensor="
            f"{config.generation.tensor})"
        )
    return faults


def memory_warnings(config: Config, shape: ModelShape, num_ranks: int) -> list[str]:
    """A line for the stage that an update fills most, when its estimated activations leave less than the reserve."""
    has = gpu_bytes(config)
    fullest = max(stage_memory(config, shape, num_ranks), key=lambda stage: stage.updating)
    if has is None or fullest.updating <= has - RESERVE_BYTES or fullest.counted > has:
        return []
    remedies = [] if config.model.recompute == "full" else ["model.recompute=full"]
    remedies += ["a smaller train.tokens_per_micro_batch", "more ranks"]
    asleep = ("weights", "gradients", "optimizer")
    parts = fullest.parts(*asleep, *(() if fullest.engine_sleeps else ("engine",)), "activations")
    return [
        f"cluster: an update needs about {fullest.updating / GIB:.1f} GiB a GPU on stage {fullest.stage} ({parts}), "
        f"{config.cluster.gpu} has {has / GIB:.1f}, of which about {RESERVE_BYTES / GIB:.0f} are for CUDA, NCCL and "
        f"the allocator: what helps is {' or '.join(remedies)}"
    ]


def checkpoint_bytes(config: Config, shape: ModelShape) -> int:
    """Bytes of one checkpoint on disk: weights and, unless `checkpoint.contents` leaves them out, Adam's moments and,
    beside bfloat16 weights, their fp32 master copy."""
    if config.checkpoint.contents == "none":
        return 0
    state = state_bytes(config) if config.checkpoint.contents == "full" else 0
    return num_parameters(shape) * (weight_bytes(config) + state)


def activation_bytes(
    config: Config, shape: ModelShape, stage: int, num_data: int = 1, shares: RowShares = ASSUMED_SHARES
) -> int:
    """Bytes of activations of the full rows that a stage has in flight, on one of `num_data` data-parallel ranks."""
    row, in_flight = full_row(config, shape, shares), rows_in_flight(config, stage, num_data)
    return held_bytes(config, shape, stage, row, in_flight, fused=config.model.spec != "local")


def weight_bytes(config: Config) -> int:
    """Bytes of one parameter's weight; `auto` is bfloat16 where there is a GPU."""
    return 4 if config.model.dtype == "float32" else 2


def state_bytes(config: Config) -> int:
    """Bytes of one parameter's moments and, beside bfloat16 weights, of its master copy."""
    return (4 if config.optim.precision_aware else 8) + (0 if config.model.dtype == "float32" else 4)


def frozen(part: Part, freeze: FreezeConfig) -> bool:
    return {"language": freeze.language, "vision": freeze.vision, "projector": freeze.projector}[part]


def _engine(config: Config, shape: ModelShape) -> int:
    """Bytes of the engine on a GPU of the trainer: 0 where engines have GPUs of their own."""
    return 0 if config.generation.placement == "separate" else _engine_share(config, shape)


def _engine_share(config: Config, shape: ModelShape) -> int:
    """Bytes of the engine on its GPU: vLLM's fraction of the GPU, or its weights and its cache where that is given; a
    whole model of transformers."""
    generation = config.generation
    if generation.engine == "transformers":
        return _engine_weights(config, shape)
    if generation.kv_cache_gib is not None:
        return _engine_weights(config, shape) + int(generation.kv_cache_gib * GIB)
    return int(generation.gpu_memory_fraction * (gpu_bytes(config) or 0))


def _engine_wakes(config: Config) -> bool:
    """Whether a vLLM takes its share of the GPU again and again, beside what the trainer keeps there."""
    return config.generation.engine == "vllm" and config.generation.placement == "colocated"


def _waking_faults(config: Config, shape: ModelShape, stage: StageMemory, has: int) -> Iterator[str]:
    """A line for an engine's share that does not fit beside what the trainer keeps between two updates.

    So much it needs to wake for rollouts, and to be started again after it died, when vLLM (0.26 to 0.32) refuses to
    start while `gpu_memory_utilization` of the GPU is not free. Its first start comes before gradients and states, and
    to be handed weights it wakes without its cache: both need less. Where the cache has a size of its own, what a
    forward pass of the engine takes beside it (some GiB) is not counted.
    """
    generation, weights, share = config.generation, _engine_weights(config, shape), stage.engine
    kept = stage.counted - share
    room = has - kept - _CUDA_TAKES
    if share <= room:
        return
    if generation.kv_cache_gib is None:
        key, most = "gpu_memory_fraction", room / has
        what = f"{generation.gpu_memory_fraction} of {has / GIB:.1f} GiB is {share / GIB:.1f}"
    else:
        key, most = "kv_cache_gib", (room - weights) / GIB
        what = f"{generation.kv_cache_gib} beside {weights / GIB:.1f} of weights is {share / GIB:.1f} GiB"
    if room > weights and most >= 0.01:
        remedy = f"the largest that would do is {int(most * 100) / 100}"
    else:
        helps = "more ranks, optim.offload_fraction or generation.placement=separate"
        remedy = f"none would do, its weights alone take {weights / GIB:.1f}: what helps is {helps}"
    parts = stage.parts().partition(", engine")[0]
    yield (
        f"generation.{key}: {what}, and stage {stage.stage} of the trainer keeps {kept / GIB:.1f} on the same GPU "
        f"({parts}): the engine could neither wake after an update nor be started again; {remedy}"
    )


def _engine_weights(config: Config, shape: ModelShape) -> int:
    generation = config.generation
    ranks = generation.tensor if generation.engine == "vllm" else 1
    return num_parameters(shape) * engine_weight_bytes(config) // ranks
