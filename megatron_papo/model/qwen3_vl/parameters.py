"""The two-way table of Qwen3-VL: Hugging Face tensors <-> Megatron parameters, for any tensor parallelism.

An entry says which Hugging Face tensors make one Megatron parameter, and how its axis is split over the tensor ranks.
Import, export, the hand-over to the engine and checkpoints all use this table; `model/parameter_map.py` copies values
by it. Names are those of the published files, which are also those in transformers' memory
(`model.language_model.layers.0...`, `model.visual.blocks.0...`, `lm_head.weight`). Without `model.` before them they
are understood as well, as in transformers.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_papo.model.decoder_parameters import decoder_entries
from megatron_papo.model.parameter_map import (
    OUTPUT_LAYER,
    ParameterEntry,
    fused_qkv_entry,
    plain_entry,
    vocabulary_entry,
)
from megatron_papo.model.shape import ModelShape, VisionShape

EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
"""Word embedding and output matrix in published files."""


def entries(shape: ModelShape) -> Iterator[ParameterEntry]:
    """An entry for every parameter, in the model's order. With tied embeddings the output layer has none."""
    yield from _vision(shape.vision)
    yield from decoder_entries(shape.language, "model.language_model.")
    if not shape.tie_word_embeddings:
        yield vocabulary_entry(OUTPUT_LAYER, HEAD, shape.language)


def _vision(shape: VisionShape) -> Iterator[ParameterEntry]:
    hidden, ffn, merged = shape.hidden_size, shape.intermediate_size, shape.hidden_size * shape.merge_unit
    patch = (shape.in_channels, shape.temporal_patch_size, shape.patch_size, shape.patch_size)
    yield plain_entry("vision.patch_embed.weight", "model.visual.patch_embed.proj.weight", (hidden, *patch))
    yield plain_entry("vision.patch_embed.bias", "model.visual.patch_embed.proj.bias", (hidden,))
    places = (shape.position_edge**2, hidden)
    yield plain_entry("vision.position_embed.weight", "model.visual.pos_embed.weight", places)
    for layer in range(shape.num_layers):
        ours, theirs = f"vision.decoder.layers.{layer}.", f"model.visual.blocks.{layer}."
        yield from _norm(ours + "input_layernorm.", theirs + "norm1.", hidden)
        for kind, rest in (("weight", (hidden,)), ("bias", ())):
            name = f"{ours}self_attention.linear_qkv.{kind}"
            yield fused_qkv_entry(name, f"{theirs}attn.qkv.{kind}", shape.num_heads, shape.head_dim, rest)
        yield from _row_parallel(ours + "self_attention.linear_proj.", theirs + "attn.proj.", hidden, hidden)
        yield from _norm(ours + "pre_mlp_layernorm.", theirs + "norm2.", hidden)
        yield from _column_parallel(ours + "mlp.linear_fc1.", theirs + "mlp.linear_fc1.", ffn, hidden)
        yield from _row_parallel(ours + "mlp.linear_fc2.", theirs + "mlp.linear_fc2.", hidden, ffn)
    yield from _merger("vision.merger.", "model.visual.merger.", shape, hidden)
    for level in range(len(shape.deepstack_layers)):
        names = f"vision.deepstack_mergers.{level}.", f"model.visual.deepstack_merger_list.{level}."
        yield from _merger(*names, shape, merged)


def _merger(ours: str, theirs: str, shape: VisionShape, norm_width: int) -> Iterator[ParameterEntry]:
    merged = shape.hidden_size * shape.merge_unit
    yield from _norm(ours + "norm.", theirs + "norm.", norm_width)
    yield from _column_parallel(ours + "linear_fc1.", theirs + "linear_fc1.", merged, merged)
    yield from _row_parallel(ours + "linear_fc2.", theirs + "linear_fc2.", shape.out_hidden_size, merged)


def _norm(ours: str, theirs: str, width: int) -> Iterator[ParameterEntry]:
    yield plain_entry(ours + "weight", theirs + "weight", (width,))
    yield plain_entry(ours + "bias", theirs + "bias", (width,))


def _column_parallel(ours: str, theirs: str, rows: int, columns: int) -> Iterator[ParameterEntry]:
    yield plain_entry(ours + "weight", theirs + "weight", (rows, columns), axis=0)
    yield plain_entry(ours + "bias", theirs + "bias", (rows,), axis=0)


def _row_parallel(ours: str, theirs: str, rows: int, columns: int) -> Iterator[ParameterEntry]:
    yield plain_entry(ours + "weight", theirs + "weight", (rows, columns), axis=1)
    yield plain_entry(ours + "bias", theirs + "bias", (rows,))


def published_name(name: str) -> str:
    """A Hugging Face name as in the published files, from any form that a file may have."""
    return f"model.{name}" if name.startswith(("visual.", "language_model.")) else name


def module_name(name: str) -> str:
    """A Hugging Face name as in the state of transformers' model, from any form."""
    return published_name(name)
