"""The two-way table of Qwen2.5-VL: Hugging Face tensors <-> Megatron parameters, for any tensor parallelism.

An entry says which Hugging Face tensors make one Megatron parameter, and how its axis is split over the tensor ranks.
Import, export, the hand-over to the engine and checkpoints all use this table; `model/parameter_map.py` copies values
by it. Names are those of the published files (`model.layers.0...`, `visual.blocks.0...`, `lm_head.weight`), which
transformers writes and reads too. Its in-memory names (`model.language_model...`, `model.visual...`), with or without
`model.`, are understood as well, as in transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from megatron_papo.model.decoder_parameters import decoder_entries
from megatron_papo.model.parameter_map import (
    OUTPUT_LAYER,
    ParameterEntry,
    fused_qkv_entry,
    gated_entry,
    plain_entry,
    vocabulary_entry,
)
from megatron_papo.model.shape import ModelShape, VisionShape

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
"""Word embedding and output matrix in published files."""


def entries(shape: ModelShape) -> Iterator[ParameterEntry]:
    """An entry for every parameter, in the model's order. With tied embeddings the output layer has none."""
    yield from _vision(shape.vision)
    yield from decoder_entries(shape.language, "model.")
    if not shape.tie_word_embeddings:
        yield vocabulary_entry(OUTPUT_LAYER, HEAD, shape.language)


def _vision(shape: VisionShape) -> Iterator[ParameterEntry]:
    hidden, ffn, merged = shape.hidden_size, shape.intermediate_size, shape.hidden_size * shape.merge_unit
    patch = (shape.in_channels, shape.temporal_patch_size, shape.patch_size, shape.patch_size)
    yield plain_entry("vision.patch_embed.weight", "visual.patch_embed.proj.weight", (hidden, *patch))
    for layer in range(shape.num_layers):
        ours, theirs = f"vision.decoder.layers.{layer}.", f"visual.blocks.{layer}."
        yield plain_entry(ours + "input_layernorm.weight", theirs + "norm1.weight", (hidden,))
        for kind, rest in (("weight", (hidden,)), ("bias", ())):
            name = f"{ours}self_attention.linear_qkv.{kind}"
            yield fused_qkv_entry(name, f"{theirs}attn.qkv.{kind}", shape.num_heads, shape.head_dim, rest)
        yield plain_entry(
            ours + "self_attention.linear_proj.weight", theirs + "attn.proj.weight", (hidden, hidden), axis=1
        )
        yield plain_entry(ours + "self_attention.linear_proj.bias", theirs + "attn.proj.bias", (hidden,))
        yield plain_entry(ours + "pre_mlp_layernorm.weight", theirs + "norm2.weight", (hidden,))
        for kind, rest in (("weight", (hidden,)), ("bias", ())):
            yield _gated(f"{ours}mlp.linear_fc1.{kind}", theirs, kind, ffn, rest)
        yield plain_entry(ours + "mlp.linear_fc2.weight", theirs + "mlp.down_proj.weight", (hidden, ffn), axis=1)
        yield plain_entry(ours + "mlp.linear_fc2.bias", theirs + "mlp.down_proj.bias", (hidden,))
    ours, theirs = "vision.merger.", "visual.merger."
    yield plain_entry(ours + "norm.weight", theirs + "ln_q.weight", (hidden,))
    yield plain_entry(ours + "linear_fc1.weight", theirs + "mlp.0.weight", (merged, merged), axis=0)
    yield plain_entry(ours + "linear_fc1.bias", theirs + "mlp.0.bias", (merged,), axis=0)
    yield plain_entry(ours + "linear_fc2.weight", theirs + "mlp.2.weight", (shape.out_hidden_size, merged), axis=1)
    yield plain_entry(ours + "linear_fc2.bias", theirs + "mlp.2.bias", (shape.out_hidden_size,))


def _gated(name: str, block: str, kind: str, width: int, rest: tuple[int, ...]) -> ParameterEntry:
    gate, up = (f"{block}mlp.{part}_proj.{kind}" for part in ("gate", "up"))
    return gated_entry(name, gate, up, width, rest)


def published_name(name: str) -> str:
    """A Hugging Face name as in the published files, from any form that a file may have."""
    if name.startswith("model.visual."):
        return name.removeprefix("model.")
    return re.sub(r"^(model\.)?language_model\.", "model.", name)


def module_name(name: str) -> str:
    """A Hugging Face name as in the state of transformers' model, from any form."""
    name = published_name(name)
    if name.startswith("visual."):
        return f"model.{name}"
    return re.sub(r"^model\.", "model.language_model.", name)
