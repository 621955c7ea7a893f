"""What forward keeps for backward, by counting what each operation of a layer saves. Imports no torch.

Counted from the modules as they are, as Korthikanti et al. 2022 (arXiv 2205.05198) do, and compared with what is held
after a forward pass in tests/parallel/test_activations.py. Of two kinds of layer, plain (the local spec) and fused
(Transformer Engine's linears with their norms within), the second is not measured yet; they differ where norms are
computed again, which the fused ones cannot. Leaves out what lives only within an operation.
Per token or patch, `b` bytes a value, H the width, A the width of all heads, G that of keys (or values), N heads, F the
FFN's width; under tensor parallelism A, G, N and F are a rank's share, and under sequence parallelism H is too.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_papo.config import Config
from megatron_papo.model.shape import LanguageShape, ModelShape, VisionShape, padded, stage_layers

_HEAD_TILE = 8192, 8192
"""Rows and words of a tile of logits on a GPU, as `logprobs.tiling.CUDA_TILE`; of fewer rows up to four times as many
words."""


@dataclass(frozen=True)
class RowSize:
    """What of a packed row its memory depends on."""

    tokens: int
    patches: int
    """Of its images, before merging."""
    responses: int
    """Tokens that the head reads, of both views in a joint row."""


@dataclass(frozen=True)
class _Layer:
    hidden: int
    heads: int
    head_width: int
    """A."""
    key_width: int
    """G."""
    ffn: int


def saved_bytes(config: Config, shape: ModelShape, stage: int, row: RowSize, *, fused: bool) -> int:
    """Of one row on one rank of pipeline stage `stage`, from its forward pass to its backward pass."""
    recompute, width = config.model.recompute, _value_bytes(config)
    spread = config.parallel.tensor if config.parallel.sequence else 1
    layer = _layer_bytes(_language(shape.language, config), recompute, width, spread, fused)
    total = row.tokens * layer * stage_layers(config.parallel, shape)[stage]
    if stage == 0 and row.patches and not (config.model.freeze.vision and config.model.freeze.projector):
        total += _vision_bytes(config, shape, row, width, spread, fused)
    total += row.tokens * 4 * shape.language.head_dim  # cosines and sines of the turns, half a head's width each
    hidden = shape.language.hidden_size
    if stage == 0:  # a rank's share of the embeddings is a view, which keeps the whole
        total += row.tokens * (hidden - hidden // spread) * width
    if stage == config.parallel.pipeline - 1:
        total += row.tokens * _norm_bytes(hidden // spread, width, outputs=0)
        total += row.responses * hidden * width
    return total


def held_bytes(config: Config, shape: ModelShape, stage: int, row: RowSize, in_flight: int, *, fused: bool) -> int:
    """The most at a time on one rank: of `in_flight` rows what is kept, and beside it what backward works with in the
    last layer, recomputation included, or in the head, whichever is more."""
    working = one_layer_bytes(config, shape, row, fused=fused) + _mlp_work_bytes(config, shape, row)
    if stage == config.parallel.pipeline - 1:
        if shape.tie_word_embeddings and config.parallel.pipeline == 1:
            working += _head_weight_bytes(config, shape)  # waits, as a gradient, for that of the same embeddings
        working = max(working, _head_work_bytes(config, shape, row))
    return in_flight * saved_bytes(config, shape, stage, row, fused=fused) + working


def _mlp_work_bytes(config: Config, shape: ModelShape, row: RowSize) -> int:
    """Gradients in the middle of an MLP's backward: of its output and what came before, of its product and of the
    first linear's output, less the product, which is no longer kept by then; and of that linear's weight. Sequence
    parallelism gathers the first linear's input, and has that input's gradient whole before it is shared out."""
    width, spread, gathered = _value_bytes(config), 1, 0
    if config.parallel.sequence:
        spread, gathered = config.parallel.tensor, 2

    def work(layer: _Layer, tokens: int) -> int:
        values = 2 * layer.ffn + 2 * layer.hidden // spread + gathered * layer.hidden
        return width * (tokens * values + 2 * layer.ffn * layer.hidden)

    return max(work(_language(shape.language, config), row.tokens), work(_vision(shape.vision, config), row.patches))


def _head_work_bytes(config: Config, shape: ModelShape, row: RowSize) -> int:
    """In the head's backward: the gradient of its weight and, in fp32, those of the hidden states, of a block of the
    weight and what is added to it, and a tile of logits with its gradient."""
    hidden, width = shape.language.hidden_size, _value_bytes(config)
    most_rows, most_words = _HEAD_TILE
    rows = max(1, min(row.responses // (2 if config.reads_joint_rows else 1), most_rows))
    words = min(most_rows * most_words // rows, 4 * most_words, shape.language.vocab_size // config.parallel.tensor)
    tile = rows * words * (4 if width == 4 else 4 + width)
    return _head_weight_bytes(config, shape) + 4 * hidden * (row.responses + 2 * words) + tile


def _head_weight_bytes(config: Config, shape: ModelShape) -> int:
    """A rank's share of the head's weight, or of its gradient."""
    words = padded(shape.language.vocab_size, config.parallel.tensor) // config.parallel.tensor
    return words * shape.language.hidden_size * _value_bytes(config)


def one_layer_bytes(config: Config, shape: ModelShape, row: RowSize, *, fused: bool) -> int:
    """What recomputation holds again of one layer at a time: the larger of a language layer's and a vision layer's; 0
    without it."""
    width, spread = _value_bytes(config), config.parallel.tensor if config.parallel.sequence else 1

    def again(layer: _Layer) -> int:
        whole, kept = (_layer_bytes(layer, each, width, spread, fused) for each in ("none", config.model.recompute))
        return whole - kept

    return max(
        row.tokens * again(_language(shape.language, config)), row.patches * again(_vision(shape.vision, config))
    )


def _layer_bytes(layer: _Layer, recompute: str, width: int, spread: int, fused: bool) -> int:
    """Of one token (or patch)."""
    hidden = layer.hidden // spread
    if recompute == "full":
        return width * hidden
    norms = 2 * _norm_bytes(hidden, width, outputs=0 if recompute != "none" and not fused else 1)
    # turned queries and keys, values, log-sum-exp; the output, which the projection reads
    attention = 2 * width * (layer.head_width + layer.key_width) + 4 * layer.heads
    values = {"none": 3, "selective": 2, "mlp": 0}[recompute]  # gate and up, their product
    return norms + attention + width * layer.ffn * values


def _norm_bytes(hidden: int, width: int, *, outputs: int) -> int:
    """Of a norm: its input, what it multiplies by, and its output where the linear layer behind keeps that."""
    return width * hidden * (1 + outputs) + 4


def _vision_bytes(config: Config, shape: ModelShape, row: RowSize, width: int, spread: int, fused: bool) -> int:
    vision = shape.vision
    layers = _layer_bytes(_vision(vision, config), config.model.recompute, width, spread, fused) * vision.num_layers
    merger = _norm_bytes(vision.hidden_size // spread, width, outputs=1)
    blocks = row.patches // vision.merge_unit
    merged = vision.hidden_size * vision.merge_unit // config.parallel.tensor
    pixels, turns = width * vision.patch_dim // spread, 4 * vision.head_dim
    return row.patches * (layers + merger + pixels + turns) + blocks * 2 * width * merged


def _language(shape: LanguageShape, config: Config) -> _Layer:
    tensor = config.parallel.tensor
    return _Layer(
        hidden=shape.hidden_size,
        heads=shape.num_heads // tensor,
        head_width=shape.num_heads * shape.head_dim // tensor,
        key_width=max(shape.num_kv_heads // tensor, 1) * shape.head_dim,
        ffn=padded(shape.intermediate_size, tensor) // tensor,
    )


def _vision(shape: VisionShape, config: Config) -> _Layer:
    tensor = config.parallel.tensor
    width = shape.hidden_size // tensor
    ffn = padded(shape.intermediate_size, tensor) // tensor
    return _Layer(shape.hidden_size, shape.num_heads // tensor, width, width, ffn)


def _value_bytes(config: Config) -> int:
    return 4 if config.model.dtype == "float32" else 2
