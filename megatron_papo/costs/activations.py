"""The memory of activations: what forward keeps for backward of a packed row, and the peak on one rank. No torch.

Adds up over stages what `model/layer_costs.py` counts of a layer and the family's `costs.py` of the vision tower, with
the embeddings, the head and the working memory of backward. Layers are of two kinds: plain (the local spec), compared
with a measurement in tests/parallel/test_activations.py, and fused (Transformer Engine's linears with their norms
within). They differ where norms are computed again, which the fused ones cannot.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_papo.config import Config
from megatron_papo.model.fp8.multiples import patch_multiple
from megatron_papo.model.layer_costs import (
    ActivationSettings,
    LayerWidths,
    costs_of,
    language_layer,
    layer_saved_bytes,
    norm_saved_bytes,
    vision_layer,
)
from megatron_papo.model.shape import ModelShape, padded, stage_layers

HEAD_TILE = 8192, 8192
"""Rows and vocabulary entries of a tile of logits on a GPU, as `logprobs.tiling.CUDA_TILE`; with fewer rows a tile has
up to four times as many entries."""


@dataclass(frozen=True)
class RowSize:
    """The lengths of a packed row that its memory depends on."""

    tokens: int
    patches: int
    """Patches of its images, before merging."""
    responses: int
    """Tokens that the head reads, of both views in a joint row."""


def saved_bytes(config: Config, shape: ModelShape, stage: int, row: RowSize, *, fused: bool) -> int:
    """Bytes that one row keeps on one rank of pipeline stage `stage`, from its forward pass to its backward pass."""
    settings = ActivationSettings.of(config, fused=fused)
    layer, value_bytes = language_layer(shape), settings.value_bytes
    total = row.tokens * layer_saved_bytes(layer, settings) * stage_layers(config.parallel, shape)[stage]
    tower_is_trained = not (config.model.freeze.vision and config.model.freeze.projector)
    if stage == 0 and tower_is_trained:
        layers = layer_saved_bytes(vision_layer(shape), settings) * shape.vision.num_layers
        patches = _padded_patches(config, shape, row, settings)
        total += patches * layers + costs_of(shape).vision_ends_bytes(patches, shape, settings)
        total += patches // shape.vision.merge_unit * layer.hidden * value_bytes  # what is put into the embeddings
    total += _levels_bytes(config, shape, stage, row, settings, tower_is_trained)
    total += row.tokens * 4 * layer.head_dim  # cosines and sines of the rotary angles, half a head's width each
    if stage == 0:  # a rank's share of the embeddings is a view, which keeps the whole
        total += row.tokens * (layer.hidden - layer.hidden // settings.sequence) * value_bytes
    if stage == config.parallel.pipeline - 1:
        total += row.tokens * norm_saved_bytes(layer, settings, outputs=0)
        total += row.responses * layer.hidden * value_bytes
    return total


def _padded_patches(config: Config, shape: ModelShape, row: RowSize, settings: ActivationSettings) -> int:
    """The patches of the row's images with the padding that the tower adds at the end."""
    recipe = config.fp8.recipe if config.fp8.vision else "off"
    multiple = patch_multiple(recipe, settings.sequence, shape.vision.merge_unit)
    return -(-row.patches // multiple) * multiple


def _levels_bytes(
    config: Config, shape: ModelShape, stage: int, row: RowSize, settings: ActivationSettings, tower_is_trained: bool
) -> int:
    """Bytes that a stage keeps of DeepStack's levels (`model/deepstack.py`).

    The first stage has them from the tower, in one tensor; the others receive those that are left in one tensor with
    the hidden states, which the first layer keeps. Sequence parallelism gathers each level where it is added, and that
    layer keeps all of its tokens with their places and whether they lie on this rank.
    """
    layers = stage_layers(config.parallel, shape)
    num_left = shape.levels_from(sum(layers[:stage]))
    whole_layers = settings.recompute == "full"
    if stage == 0 and not tower_is_trained and not whole_layers:
        return 0  # no gradient goes to them; the recomputation of whole layers keeps their inputs all the same
    tokens = _padded_patches(config, shape, row, settings) // shape.vision.merge_unit
    level = tokens * shape.language.hidden_size * settings.value_bytes
    arrived = num_left * level // settings.sequence
    if settings.sequence == 1 or whole_layers:
        return arrived
    gathered = min(num_left, layers[stage]) * (level + tokens * (8 + 1))
    return gathered if stage == 0 else arrived + gathered


def held_bytes(config: Config, shape: ModelShape, stage: int, row: RowSize, in_flight: int, *, fused: bool) -> int:
    """The peak of activations on one rank, in bytes: what `in_flight` rows keep, and beside it what backward works with
    in the last layer, recomputation included, or in the head, whichever is more."""
    settings = ActivationSettings.of(config, fused=fused)
    working = _recomputed_layer_bytes(shape, row, settings) + _mlp_work_bytes(shape, row, settings)
    if stage == config.parallel.pipeline - 1:
        if shape.tie_word_embeddings and config.parallel.pipeline == 1:
            working += _head_weight_bytes(shape, settings)  # its gradient waits for that of the same embeddings
        working = max(working, _head_work_bytes(config, shape, row, settings))
    return in_flight * saved_bytes(config, shape, stage, row, fused=fused) + working


def _mlp_work_bytes(shape: ModelShape, row: RowSize, settings: ActivationSettings) -> int:
    """Bytes of the gradients in the middle of an MLP's backward, in the layer that has most: those of its output and of
    what came before, of its product and of the first linear's output, less the product, which is no longer kept by
    then; and that of the first linear's weight. Sequence parallelism gathers the first linear's input, and has that
    input's gradient whole before it is shared out."""
    gathered = 2 if settings.sequence > 1 else 0

    def work(layer: LayerWidths, tokens: int) -> int:
        product = padded(layer.ffn, settings.tensor) // settings.tensor
        first_linear = 2 * product if layer.gated else product
        values = first_linear + 2 * layer.hidden // settings.sequence + gathered * layer.hidden
        return settings.value_bytes * (tokens * values + first_linear * layer.hidden)

    return max(work(language_layer(shape), row.tokens), work(vision_layer(shape), row.patches))


def _head_work_bytes(config: Config, shape: ModelShape, row: RowSize, settings: ActivationSettings) -> int:
    """Bytes in the head's backward: the gradient of its weight and, in fp32, those of the hidden states, of a block of
    the weight and what is added to it, and a tile of logits with its gradient."""
    hidden, value_bytes = shape.language.hidden_size, settings.value_bytes
    most_rows, most_words = HEAD_TILE
    rows = max(1, min(row.responses // (2 if config.reads_joint_rows else 1), most_rows))
    words = min(most_rows * most_words // rows, 4 * most_words, shape.language.vocab_size // settings.tensor)
    tile = rows * words * (4 if value_bytes == 4 else 4 + value_bytes)
    return _head_weight_bytes(shape, settings) + 4 * hidden * (row.responses + 2 * words) + tile


def _head_weight_bytes(shape: ModelShape, settings: ActivationSettings) -> int:
    """Bytes of a rank's share of the head's weight, or of its gradient."""
    words = padded(shape.language.vocab_size, settings.tensor) // settings.tensor
    return words * shape.language.hidden_size * settings.value_bytes


def _recomputed_layer_bytes(shape: ModelShape, row: RowSize, settings: ActivationSettings) -> int:
    """Bytes that recomputation makes again in one layer at a time, the larger of a language layer's and a vision
    layer's; 0 without it."""
    whole = replace(settings, recompute="none")

    def again(layer: LayerWidths) -> int:
        return layer_saved_bytes(layer, whole) - layer_saved_bytes(layer, settings)

    return max(row.tokens * again(language_layer(shape)), row.patches * again(vision_layer(shape)))
