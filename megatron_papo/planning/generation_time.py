"""Seconds of a step's rollouts in vLLM: prompts once a group, then passes that each add a token to every sequence.

A decoding pass reads the weights and the keys and values of all sequences, and exchanges between tensor ranks twice a
layer. Sequences end at different lengths, so that the batch thins out over the passes of the longest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_papo.config import Config
from megatron_papo.config.derived import engine_weight_bytes
from megatron_papo.costs.flops import group_flops
from megatron_papo.costs.hardware import Cluster
from megatron_papo.costs.memory import num_parameters
from megatron_papo.model.shape import ModelShape
from megatron_papo.planning.assumptions import Assumptions
from megatron_papo.planning.collectives import all_reduce_s
from megatron_papo.planning.workload import Workload


@dataclass(frozen=True)
class Rollouts:
    """The predicted generation of a step's rollouts."""

    seconds: float
    waves: int
    """1 where keys and values of all sequences of an engine have room at once."""
    kv_bytes: int
    """Bytes on one GPU for all sequences at their mean length, as far as there is room."""


def kv_bytes_per_token(shape: ModelShape, engine_tensor: int) -> float:
    """Bytes of a token's keys and values on one GPU of the engine, in bfloat16; an engine that has more ranks than
    key-value heads repeats them."""
    heads = max(shape.language.num_kv_heads / engine_tensor, 1)
    return 2 * shape.language.num_layers * heads * shape.language.head_dim * 2


def rollouts(
    config: Config, shape: ModelShape, cluster: Cluster, assumed: Assumptions, work: Workload, room: float
) -> Rollouts:
    """The rollouts of one step; `room`: bytes for keys and values on one GPU."""
    size = config.generation.tensor
    engines = cluster.num_gpus / size
    groups = work.prompts / engines
    each = kv_bytes_per_token(shape, size)
    needed = groups * (work.prompt_tokens(shape) + work.group_size * work.response_tokens) * each
    waves = max(1, math.ceil(needed / room))
    passes = min(work.longest_response, assumed.length_tail * work.response_tokens)
    batch = groups * work.group_size / waves * work.response_tokens / passes
    decoding = waves * passes * _pass_s(config, shape, cluster, assumed, work, batch)
    peak = cluster.gpu.peaks.bfloat16 * 1e12 * assumed.matmul * size
    prompt = group_flops(work.prompt_tokens(shape), [], work.grids, shape).total
    return Rollouts((groups * prompt / peak + decoding) * assumed.generate_factor, waves, int(min(needed, room)))


def _pass_s(
    config: Config, shape: ModelShape, cluster: Cluster, assumed: Assumptions, work: Workload, batch: float
) -> float:
    """Seconds of one decoding pass over `batch` sequences."""
    size, gpu = config.generation.tensor, cluster.gpu
    parameters, memory = num_parameters(shape) / size, gpu.memory_gb_s * 1e9 * assumed.memory
    length = work.prompt_tokens(shape) + work.response_tokens / 2
    reading = (parameters * engine_weight_bytes(config) + batch * length * kv_bytes_per_token(shape, size)) / memory
    computing = 2 * parameters * batch / (gpu.peaks.bfloat16 * 1e12 * assumed.matmul)
    exchange = (
        2 * shape.language.num_layers * all_reduce_s(batch * shape.language.hidden_size * 2, size, cluster, assumed)
    )
    return max(reading, computing) + exchange + assumed.decode_launch_s
