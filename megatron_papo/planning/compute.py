"""Seconds of one row on each pipeline stage, forward and backward: products, element-wise work, tensor exchanges."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_papo.config import Config
from megatron_papo.costs.activations import RowSize, saved_bytes
from megatron_papo.costs.flops import Flops
from megatron_papo.costs.hardware import Cluster
from megatron_papo.model.layer_costs import language_layer, vision_layer
from megatron_papo.model.shape import ModelShape
from megatron_papo.planning.assumptions import Assumptions
from megatron_papo.planning.collectives import all_reduce_s, gather_s


@dataclass(frozen=True)
class StageSeconds:
    """Seconds of one row on each pipeline stage."""

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    """Seconds of the backward pass, with what it computes again."""
    exchange: float
    """Seconds of tensor exchanges in the forward pass of the slowest stage."""
    vision: float
    """Seconds of the vision tower in the forward pass of the first stage."""


@dataclass(frozen=True)
class _Rates:
    """FLOP/s and bytes/s of a model-parallel rank's GPU."""

    products: float
    attention: float
    head: float
    memory: float


def stage_seconds(
    config: Config, shape: ModelShape, cluster: Cluster, assumed: Assumptions, flops: Flops, size: RowSize
) -> StageSeconds:
    """The seconds of a row of that size; `flops`: of one forward pass over it."""
    layers = config.parallel.pipeline_layers or [shape.language.num_layers]
    rates, tensor = _rates(config, cluster, assumed), config.parallel.tensor
    num_layers = shape.language.num_layers
    product = flops.language / num_layers / tensor / rates.products
    attention = flops.attention / num_layers / tensor / rates.attention
    moved = 2 * _layer_bytes(config, shape, size) / rates.memory
    own = max(product + attention + moved, assumed.layer_launch_s)
    exchange = _exchange_s(size.tokens * shape.language.hidden_size * 2, config, cluster, assumed)
    vision, vision_exchange = _vision_s(config, shape, cluster, assumed, flops, size, rates)
    head = flops.head / tensor / rates.head
    recompute = config.model.recompute
    elementwise = _elementwise_again_s(config, shape, size, rates) if recompute in ("selective", "mlp") else 0.0
    forward, backward = [], []
    for stage, count in enumerate(layers):
        ends = (vision + vision_exchange if stage == 0 else 0.0) + (head if stage == len(layers) - 1 else 0.0)
        once = count * (own + exchange) + ends
        gathers = _gathers_s(config, shape, cluster, assumed, size, count)
        forward.append(once)
        backward.append(2 * once + gathers + (once if recompute == "full" else count * elementwise))
        if recompute == "mlp":
            tower = vision * vision_layer(shape).first_linear_share if stage == 0 else 0.0
            backward[-1] += count * product * language_layer(shape).first_linear_share + tower + gathers / 2
    slowest = max(range(len(layers)), key=lambda stage: forward[stage])
    return StageSeconds(tuple(forward), tuple(backward), layers[slowest] * exchange, vision + vision_exchange)


def _vision_s(
    config: Config,
    shape: ModelShape,
    cluster: Cluster,
    assumed: Assumptions,
    flops: Flops,
    size: RowSize,
    rates: _Rates,
) -> tuple[float, float]:
    """Seconds of the vision tower on the first stage, forward: of computing, of exchanging."""
    if not size.patches:
        return 0.0, 0.0
    tensor, vision = config.parallel.tensor, shape.vision
    own = flops.vision / tensor / rates.products
    exchange = vision.num_layers * _exchange_s(size.patches * vision.hidden_size * 2, config, cluster, assumed)
    return max(own, vision.num_layers * assumed.layer_launch_s), exchange


def _exchange_s(num_bytes: float, config: Config, cluster: Cluster, assumed: Assumptions) -> float:
    """Seconds of the exchanges in a layer's forward pass: two sums over the tensor ranks, or as much in gathers and
    scattered sums."""
    return 2 * all_reduce_s(num_bytes, config.parallel.tensor, cluster, assumed) * _exposed_fraction(config, assumed)


def _exposed_fraction(config: Config, assumed: Assumptions) -> float:
    """Share of tensor exchanges that computation does not hide."""
    return 1 - (assumed.hidden_tensor if config.parallel.overlap_tensor else 0.0)


def _gathers_s(
    config: Config, shape: ModelShape, cluster: Cluster, assumed: Assumptions, size: RowSize, count: int
) -> float:
    """Seconds of backward's gathers in `count` layers: sequence parallelism gathers the inputs of a layer's two
    column-parallel products once more."""
    if not config.parallel.sequence:
        return 0.0
    num_bytes = size.tokens * shape.language.hidden_size * 2
    return (
        count * 2 * gather_s(num_bytes, config.parallel.tensor, cluster, assumed) * _exposed_fraction(config, assumed)
    )


def _elementwise_again_s(config: Config, shape: ModelShape, size: RowSize, rates: _Rates) -> float:
    """Seconds to compute a layer's activation function and norms again: they read at most twice what they write."""
    fused = config.model.spec != "local"
    whole, kept = (_layer_bytes(config, shape, size, which, fused=fused) for which in ("none", "selective"))
    return 3 * (whole - kept) / rates.memory


def _layer_bytes(
    config: Config, shape: ModelShape, size: RowSize, recompute: str = "none", *, fused: bool = True
) -> float:
    """Bytes that a layer keeps for backward; with nothing computed again a measure of its element-wise work."""
    alone = RowSize(size.tokens, 0, 0)
    model = config.model.model_copy(update={"recompute": recompute})
    parallel = config.parallel.model_copy(update={"pipeline": 1, "pipeline_layers": None})
    whole = saved_bytes(config.model_copy(update={"model": model, "parallel": parallel}), shape, 0, alone, fused=fused)
    return whole / shape.language.num_layers


def _rates(config: Config, cluster: Cluster, assumed: Assumptions) -> _Rates:
    gpu = cluster.gpu
    bf16 = gpu.peaks.bfloat16 * 1e12
    products = bf16 * assumed.matmul
    if config.fp8.enabled and gpu.peaks.fp8:
        products = gpu.peaks.fp8 * 1e12 * assumed.fp8_matmul
    return _Rates(products, bf16 * assumed.attention, bf16 * assumed.matmul, gpu.memory_gb_s * 1e9 * assumed.memory)
