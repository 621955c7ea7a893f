"""The toy family's two-way table; its names are the same in files and in the state of its model."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_papo.model.parameter_map import (
    OUTPUT_LAYER,
    WORD_EMBEDDINGS,
    ParameterEntry,
    fused_qkv_entry,
    plain_entry,
    qkv_entry,
    vocabulary_entry,
)
from megatron_papo.model.shape import LanguageShape, ModelShape, VisionShape

EMBEDDING, HEAD = "words.weight", "logits.weight"


def entries(shape: ModelShape) -> Iterator[ParameterEntry]:
    """An entry for every parameter, in the model's order."""
    yield from _vision(shape.vision)
    yield from _language(shape.language)
    if not shape.tie_word_embeddings:
        yield vocabulary_entry(OUTPUT_LAYER, HEAD, shape.language)


def published_name(name: str) -> str:
    """The name as it is: there is one form."""
    return name


def module_name(name: str) -> str:
    """The name as it is: there is one form."""
    return name


def _language(shape: LanguageShape) -> Iterator[ParameterEntry]:
    yield vocabulary_entry(WORD_EMBEDDINGS, EMBEDDING, shape)
    hidden, queries = shape.hidden_size, shape.num_heads * shape.head_dim
    for layer in range(shape.num_layers):
        ours, theirs = f"language.decoder.layers.{layer}.", f"decoder.{layer}."
        yield from _norm(ours + "input_layernorm", theirs + "before_attention", hidden)
        attention = ours + "self_attention."
        for kind, rest in (("weight", (hidden,)), ("bias", ())):
            names = [f"{theirs}attention.{part}.{kind}" for part in ("queries", "keys", "values")]
            yield qkv_entry(f"{attention}linear_qkv.{kind}", names, shape, rest)
        for part in ("query", "key"):
            yield from _norm(f"{attention}{part[0]}_layernorm", f"{theirs}attention.{part}_norm", shape.head_dim)
        yield from _rows(attention + "linear_proj", theirs + "attention.out", hidden, queries)
        yield from _norm(ours + "pre_mlp_layernorm", theirs + "before_mlp", hidden)
        yield from _mlp(ours, theirs, hidden, shape.intermediate_size)
    yield from _norm("language.decoder.final_layernorm", "last_norm", hidden)


def _vision(shape: VisionShape) -> Iterator[ParameterEntry]:
    hidden = shape.hidden_size
    yield plain_entry("vision.patch_embed.weight", "tower.patches.weight", (hidden, shape.patch_dim))
    for layer in range(shape.num_layers):
        ours, theirs = f"vision.decoder.layers.{layer}.", f"tower.blocks.{layer}."
        yield from _norm(ours + "input_layernorm", theirs + "before_attention", hidden)
        for kind, rest in (("weight", (hidden,)), ("bias", ())):
            name = f"{ours}self_attention.linear_qkv.{kind}"
            yield fused_qkv_entry(name, f"{theirs}attention.qkv.{kind}", shape.num_heads, shape.head_dim, rest)
        yield from _rows(ours + "self_attention.linear_proj", theirs + "attention.out", hidden, hidden)
        yield from _norm(ours + "pre_mlp_layernorm", theirs + "before_mlp", hidden)
        yield from _mlp(ours, theirs, hidden, shape.intermediate_size)
    yield from _norm("vision.merger.norm", "tower.merge_norm", hidden)
    yield plain_entry("vision.merger.weight", "tower.merge.weight", (shape.out_hidden_size, hidden))


def _norm(ours: str, theirs: str, width: int) -> Iterator[ParameterEntry]:
    for kind in ("weight", "bias"):
        yield plain_entry(f"{ours}.{kind}", f"{theirs}.{kind}", (width,))


def _rows(ours: str, theirs: str, width: int, read: int) -> Iterator[ParameterEntry]:
    """A row-parallel linear layer with a bias."""
    yield plain_entry(ours + ".weight", theirs + ".weight", (width, read), axis=1)
    yield plain_entry(ours + ".bias", theirs + ".bias", (width,))


def _mlp(ours: str, theirs: str, hidden: int, inner: int) -> Iterator[ParameterEntry]:
    yield plain_entry(ours + "mlp.linear_fc1.weight", theirs + "mlp.0.weight", (inner, hidden), axis=0)
    yield plain_entry(ours + "mlp.linear_fc1.bias", theirs + "mlp.0.bias", (inner,), axis=0)
    yield from _rows(ours + "mlp.linear_fc2", theirs + "mlp.2", hidden, inner)
