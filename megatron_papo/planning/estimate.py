"""One candidate: the memory of every stage by part, the seconds of every stage of a step, and whether it fits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from megatron_papo.config import Config
from megatron_papo.config.derived import engine_weight_bytes
from megatron_papo.costs.activations import RowSize
from megatron_papo.costs.hardware import Cluster
from megatron_papo.costs.memory import GIB, RESERVE_BYTES, StageMemory, num_parameters, stage_memory, state_bytes
from megatron_papo.model.shape import ModelShape
from megatron_papo.planning.assumptions import Assumptions
from megatron_papo.planning.candidates import Candidate
from megatron_papo.planning.collectives import along_s, gather_s
from megatron_papo.planning.compute import StageSeconds, stage_seconds
from megatron_papo.planning.generation_time import Rollouts, kv_bytes_per_token, rollouts
from megatron_papo.planning.schedule import forward_backward_s, forward_s
from megatron_papo.planning.workload import Rows, Workload

_LEAST_SEQUENCES = 8
"""Sequences of the greatest length that an engine must have room for."""


@dataclass(frozen=True)
class Memory:
    """Bytes on a GPU of one stage."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    engine: int
    """The engine's weights, during generation, beside the first three."""
    kv: int

    @property
    def training(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations

    @property
    def generating(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.engine + self.kv

    @property
    def peak(self) -> int:
        return max(self.training, self.generating)


@dataclass(frozen=True)
class Estimate:
    """The predicted memory and seconds of a candidate."""

    candidate: Candidate
    stages: tuple[Memory, ...]
    seconds: dict[str, float]
    """Seconds by stage of a step: generate, score, update, hand_over; parts of the update under `update/...`."""
    bubble: float
    """Share of the updates' time in which stages stand still."""
    num_rows: int
    """Rows of an update on a data-parallel rank."""
    waves: int
    tokens_per_s: float
    """Tokens of rollouts with their prompts, per second of the whole step and GPU."""
    mfu: float
    """Share of bf16's peak that the updates reach."""
    reason: str = ""
    """Why it does not fit; empty when it does."""

    @property
    def step_s(self) -> float:
        return sum(value for name, value in self.seconds.items() if "/" not in name)

    @property
    def fullest(self) -> Memory:
        """The stage that an update fills most, which is the one that `papo check` prints."""
        return max(self.stages, key=lambda stage: stage.training)

    @property
    def peak(self) -> int:
        """Bytes of the fullest GPU at its fullest moment."""
        return max(stage.peak for stage in self.stages)


def estimate(
    candidate: Candidate, config: Config, shape: ModelShape, cluster: Cluster, assumed: Assumptions, work: Workload
) -> Estimate:
    """The estimate of a candidate; `config` may have its settings or not."""
    return estimate_applied(candidate, candidate.applied(config), shape, cluster, assumed, work)


def estimate_applied(
    candidate: Candidate, config: Config, shape: ModelShape, cluster: Cluster, assumed: Assumptions, work: Workload
) -> Estimate:
    """The estimate of a candidate whose settings `config` has already."""
    rows = work.rows(shape, candidate.data, candidate.pipeline)
    counted = stage_memory(config, shape, cluster.num_gpus, work.shares)
    stages, room = _memory(candidate, config, shape, cluster, counted)
    each = stage_seconds(config, shape, cluster, assumed, rows.flops(shape), rows.size(shape))
    made = rollouts(config, shape, cluster, assumed, work, max(room, 1.0))
    stages = tuple(_with_kv(stage, made) for stage in stages)
    seconds, bubble = _seconds(candidate, config, shape, cluster, assumed, rows, each, counted)
    seconds["generate"] = made.seconds
    total = sum(value for name, value in seconds.items() if "/" not in name)
    work_flops = 3 * rows.flops(shape).total * rows.num * work.updates * candidate.data
    peak = cluster.num_gpus * cluster.gpu.peaks.bfloat16 * 1e12
    return Estimate(
        candidate=candidate,
        stages=stages,
        seconds=seconds,
        bubble=bubble,
        num_rows=rows.num,
        waves=made.waves,
        tokens_per_s=work.step_tokens(shape) / total / cluster.num_gpus,
        mfu=work_flops / seconds["update"] / peak,
        reason=_reason(stages, room, config, shape, cluster, work),
    )


def _memory(
    candidate: Candidate, config: Config, shape: ModelShape, cluster: Cluster, counted: tuple[StageMemory, ...]
) -> tuple[tuple[Memory, ...], float]:
    """The memory of every stage without keys and values, and the bytes that are left for those on the fullest GPU."""
    engine = num_parameters(shape) * engine_weight_bytes(config) // candidate.engine_tensor
    if config.generation.placement == "separate":
        engine = 0
    stages = tuple(
        Memory(each.weights, each.gradients, each.optimizer, each.activations, engine, 0) for each in counted
    )
    room = cluster.gpu.memory_gib * GIB - RESERVE_BYTES - max(stage.generating for stage in stages)
    return stages, room


def _with_kv(stage: Memory, made: Rollouts) -> Memory:
    return Memory(stage.weights, stage.gradients, stage.optimizer, stage.activations, stage.engine, made.kv_bytes)


def _reason(
    stages: tuple[Memory, ...], room: float, config: Config, shape: ModelShape, cluster: Cluster, work: Workload
) -> str:
    has = cluster.gpu.memory_gib * GIB - RESERVE_BYTES
    worst = max(range(len(stages)), key=lambda stage: stages[stage].training)
    if stages[worst].training > has:
        parts = ("weights", "gradients", "optimizer", "activations")
        told = ", ".join(f"{part} {getattr(stages[worst], part) / GIB:.1f}" for part in parts)
        return f"stage {worst} needs {stages[worst].training / GIB:.1f} GiB to train ({told}) of {has / GIB:.1f}"
    longest = (work.prompt_tokens(shape) + work.longest_response) * kv_bytes_per_token(shape, config.generation.tensor)
    if room < _LEAST_SEQUENCES * longest:
        held = max(stage.weights + stage.gradients + stage.optimizer for stage in stages)
        return (
            f"beside {held / GIB:.1f} GiB of the policy and {stages[0].engine / GIB:.1f} of an engine, "
            f"of {has / GIB:.1f}, there is no room for {_LEAST_SEQUENCES} of the longest sequences "
            f"({longest / GIB:.2f} each)"
        )
    return ""


def _seconds(
    candidate: Candidate,
    config: Config,
    shape: ModelShape,
    cluster: Cluster,
    assumed: Assumptions,
    rows: Rows,
    each: StageSeconds,
    counted: tuple[StageMemory, ...],
) -> tuple[dict[str, float], float]:
    """Seconds of all stages of a step but generation, and the bubble of the updates."""
    work, size = rows.work, rows.size(shape)
    sends = _sends_s(candidate, shape, cluster, assumed, size)
    schedule, bubble = _pipeline_s(each.forward, each.backward, rows.num, sends)
    schedule *= 1 + assumed.row_spread
    # views of a joint row are halves of it; scoring reads rows of one view
    reduce, step = _after_backward_s(candidate, config, cluster, assumed, counted)
    update = work.updates * (schedule + reduce + step) * assumed.update_factor
    score = work.score_passes * forward_s(each.forward, rows.num * work.updates, sends) / (2 if work.joint else 1)
    seconds = {
        "score": score * (1 + assumed.row_spread) * assumed.score_factor,
        "update": update,
        "hand_over": _handover_s(candidate, shape, cluster, assumed) * assumed.handover_factor,
        "update/exchange": work.updates * rows.num * each.exchange * 3,
        "update/vision": work.updates * rows.num * each.vision * 3,
        "update/gradients": work.updates * reduce,
        "update/optimizer": work.updates * step,
    }
    return seconds, bubble


def _sends_s(
    candidate: Candidate, shape: ModelShape, cluster: Cluster, assumed: Assumptions, size: RowSize
) -> tuple[float, ...]:
    """Seconds of a row from each stage to the next: its hidden states and, of each level of DeepStack that is not yet
    added, the image tokens."""
    image_tokens = size.patches // shape.vision.merge_unit
    places = (size.tokens + shape.levels_from(first) * image_tokens for first in accumulate(candidate.layers[:-1]))
    apart = candidate.tensor * candidate.data  # ranks of two stages
    width = shape.language.hidden_size * 2 / candidate.tensor
    return tuple(along_s(num * width, candidate.pipeline, cluster, assumed, apart) for num in places)


_pipeline_s = lru_cache(maxsize=256)(forward_backward_s)
"""Candidates that differ in optimizer or engine alone have the same schedule, and its simulation is what a plan waits
for."""


def _after_backward_s(
    candidate: Candidate, config: Config, cluster: Cluster, assumed: Assumptions, counted: tuple[StageMemory, ...]
) -> tuple[float, float]:
    """Seconds of the data-parallel exchange (fp32 gradients scattered, bf16 weights gathered) and of Adam."""
    parameters = max(stage.gradients for stage in counted) / 4
    stride = candidate.tensor
    hidden = assumed.hidden_data if config.parallel.overlap_data else 0.0
    exchange = gather_s(6 * parameters, candidate.data, cluster, assumed, stride) * (1 - hidden)
    own = parameters / candidate.data
    offloaded = config.optim.offload_fraction
    memory = cluster.gpu.memory_gb_s * 1e9 * assumed.memory
    on_gpu = own * (1 - offloaded) * (4 + 2 * state_bytes(config) + 2) / memory
    # of the offloaded share gradients go down, weights come up, and the host's Adam reads and writes its own memory
    on_host = own * offloaded * (6 / (cluster.gpu.host_gb_s * 1e9) + (4 + 2 * state_bytes(config)) / HOST_ADAM_BYTES_S)
    return exchange, max(on_gpu, on_host)


HOST_ADAM_BYTES_S = 20e9
"""A rank's share of the host's memory rate, in bytes per second: eight ranks on a node of about 400 GB/s, less what
else it does."""


def _handover_s(candidate: Candidate, shape: ModelShape, cluster: Cluster, assumed: Assumptions) -> float:
    """Seconds of the weight hand-over: every rank receives the whole model, over NVLink from its tensor group, then
    from the other stages."""
    num_bytes = 2.0 * num_parameters(shape)
    gathered = gather_s(num_bytes, candidate.tensor, cluster, assumed)
    sent = along_s(num_bytes, candidate.pipeline, cluster, assumed, candidate.tensor * candidate.data)
    copied = num_bytes / (cluster.gpu.memory_gb_s * 1e9 * assumed.memory)
    return (gathered + sent + copied) / assumed.handover
