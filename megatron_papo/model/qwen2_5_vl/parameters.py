"""The one two-way table of Qwen2.5-VL: Hugging Face tensors <-> Megatron parameters, for any tensor parallelism.

An entry says which Hugging Face tensors make one Megatron parameter, and how its axis is split over the tensor ranks.
Import, export, the hand-over to the engine and checkpoints all walk this table; slices.py says how they copy.
Names are those of the published files (`model.layers.0...`, `visual.blocks.0...`, `lm_head.weight`), which
transformers writes and reads too; its in-memory names (`model.language_model...`, `model.visual...`), and the latter
without `model.`, are understood, as transformers does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from megatron_papo.model.parameter_map import ParameterEntry, RowRange, TensorSource, flat_shape
from megatron_papo.model.shape import LanguageShape, ModelShape, VisionShape


def parameter_table(shape: ModelShape) -> dict[str, ParameterEntry]:
    """Every parameter of the model by Megatron name, in the model's order.

    Tied embeddings: `language.output_layer.weight` is the word embedding once more, and has no tensor of its own.
    """
    entries = [*_vision(shape.vision), *_language(shape.language)]
    if not shape.tie_word_embeddings:
        entries.append(_head(shape.language, OUTPUT_LAYER, HEAD))
    return {entry.name: entry for entry in entries}


OUTPUT_LAYER = "language.output_layer.weight"
WORD_EMBEDDINGS = "language.embedding.word_embeddings.weight"
HEAD, WORDS = "lm_head.weight", "model.embed_tokens.weight"
"""The same two in published files."""


def _language(shape: LanguageShape) -> Iterator[ParameterEntry]:
    yield _head(shape, WORD_EMBEDDINGS, WORDS)
    hidden, ffn, heads = shape.hidden_size, shape.intermediate_size, shape.num_heads * shape.head_dim
    for layer in range(shape.num_layers):
        ours, theirs = f"language.decoder.layers.{layer}.", f"model.layers.{layer}."
        yield _plain(ours + "input_layernorm.weight", theirs + "input_layernorm.weight", (hidden,))
        for kind, rest in (("weight", (hidden,)), ("bias", ())):
            names = [f"{theirs}self_attn.{part}_proj.{kind}" for part in "qkv"]
            yield _qkv(f"{ours}self_attention.linear_qkv.{kind}", names, shape, rest)
        yield _plain(
            ours + "self_attention.linear_proj.weight", theirs + "self_attn.o_proj.weight", (hidden, heads), axis=1
        )
        yield _plain(ours + "pre_mlp_layernorm.weight", theirs + "post_attention_layernorm.weight", (hidden,))
        yield _gated(ours + "mlp.linear_fc1.weight", theirs, "weight", ffn, (hidden,))
        yield _plain(ours + "mlp.linear_fc2.weight", theirs + "mlp.down_proj.weight", (hidden, ffn), axis=1)
    yield _plain("language.decoder.final_layernorm.weight", "model.norm.weight", (hidden,))


def _vision(shape: VisionShape) -> Iterator[ParameterEntry]:
    hidden, ffn, merged = shape.hidden_size, shape.intermediate_size, shape.hidden_size * shape.merge_unit
    patch = (shape.in_channels, shape.temporal_patch_size, shape.patch_size, shape.patch_size)
    yield _plain("vision.patch_embed.weight", "visual.patch_embed.proj.weight", (hidden, *patch))
    for layer in range(shape.num_layers):
        ours, theirs = f"vision.decoder.layers.{layer}.", f"visual.blocks.{layer}."
        yield _plain(ours + "input_layernorm.weight", theirs + "norm1.weight", (hidden,))
        for kind, rest in (("weight", (hidden,)), ("bias", ())):
            name = f"{ours}self_attention.linear_qkv.{kind}"
            yield _fused_qkv(name, f"{theirs}attn.qkv.{kind}", shape, rest)
        yield _plain(ours + "self_attention.linear_proj.weight", theirs + "attn.proj.weight", (hidden, hidden), axis=1)
        yield _plain(ours + "self_attention.linear_proj.bias", theirs + "attn.proj.bias", (hidden,))
        yield _plain(ours + "pre_mlp_layernorm.weight", theirs + "norm2.weight", (hidden,))
        for kind, rest in (("weight", (hidden,)), ("bias", ())):
            yield _gated(f"{ours}mlp.linear_fc1.{kind}", theirs, kind, ffn, rest)
        yield _plain(ours + "mlp.linear_fc2.weight", theirs + "mlp.down_proj.weight", (hidden, ffn), axis=1)
        yield _plain(ours + "mlp.linear_fc2.bias", theirs + "mlp.down_proj.bias", (hidden,))
    ours, theirs = "vision.merger.", "visual.merger."
    yield _plain(ours + "norm.weight", theirs + "ln_q.weight", (hidden,))
    yield _plain(ours + "linear_fc1.weight", theirs + "mlp.0.weight", (merged, merged), axis=0)
    yield _plain(ours + "linear_fc1.bias", theirs + "mlp.0.bias", (merged,), axis=0)
    yield _plain(ours + "linear_fc2.weight", theirs + "mlp.2.weight", (shape.out_hidden_size, merged), axis=1)
    yield _plain(ours + "linear_fc2.bias", theirs + "mlp.2.bias", (shape.out_hidden_size,))


def _plain(name: str, source: str, shape: tuple[int, ...], axis: int | None = None) -> ParameterEntry:
    """One tensor as it is; replicated, or split along `axis`: 0 column-parallel, 1 row-parallel."""
    return ParameterEntry(name, (TensorSource(source, shape),), (RowRange(0, 0, shape[0]),), flat_shape(shape), axis)


def _head(shape: LanguageShape, name: str, source: str) -> ParameterEntry:
    """Rows of the vocabulary, padded at its end."""
    return _plain(name, source, (shape.vocab_size, shape.hidden_size), axis=0)


def _gated(name: str, block: str, kind: str, ffn: int, rest: tuple[int, ...]) -> ParameterEntry:
    """A gated MLP's first layer: a rank holds its shard of the gate, then its shard of the up projection."""
    sources = tuple(TensorSource(f"{block}mlp.{part}_proj.{kind}", (ffn, *rest)) for part in ("gate", "up"))
    return ParameterEntry(name, sources, (RowRange(0, 0, ffn), RowRange(1, 0, ffn)), (2 * ffn, *rest), axis=0, parts=2)


def _qkv(name: str, sources: list[str], shape: LanguageShape, rest: tuple[int, ...]) -> ParameterEntry:
    """Megatron's order: of each query group its queries, its key, its value. A rank holds a contiguous share of the
    rows; with more ranks than groups the share ends inside a group, and Megatron gathers the rows at run time."""
    head, queries = shape.head_dim, shape.num_heads // shape.num_kv_heads * shape.head_dim
    rows = (shape.num_heads * head, shape.num_kv_heads * head, shape.num_kv_heads * head)
    runs = tuple(
        RowRange(source, group * length, length)
        for group in range(shape.num_kv_heads)
        for source, length in ((0, queries), (1, head), (2, head))
    )
    tensors = tuple(TensorSource(source, (length, *rest)) for source, length in zip(sources, rows))
    return ParameterEntry(name, tensors, runs, (sum(rows), *rest), axis=0)


def _fused_qkv(name: str, source: str, shape: VisionShape, rest: tuple[int, ...]) -> ParameterEntry:
    """One tensor with all queries, then all keys, then all values; in Megatron q, k, v of each head."""
    head, hidden = shape.head_dim, shape.hidden_size
    runs = tuple(RowRange(0, part * hidden + i * head, head) for i in range(shape.num_heads) for part in range(3))
    return ParameterEntry(name, (TensorSource(source, (3 * hidden, *rest)),), runs, (3 * hidden, *rest), axis=0)


_TABLE_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""Transformer Engine fuses the two norms of a layer into the linear layers behind them."""


def table_name(name: str) -> str:
    """The table's name of a parameter: that of the local layer spec, for Transformer Engine's fused norms too."""
    for fused, plain in _TABLE_NAMES.items():
        if name.endswith(fused):
            return name.removesuffix(fused) + plain
    return name


def published_name(name: str) -> str:
    """A Hugging Face name as in the published files, from any form."""
    if name.startswith("model.visual."):
        return name.removeprefix("model.")
    return re.sub(r"^(model\.)?language_model\.", "model.", name)


def module_name(name: str) -> str:
    """A Hugging Face name as in transformers' module, from either form."""
    name = published_name(name)
    if name.startswith("visual."):
        return f"model.{name}"
    return re.sub(r"^model\.", "model.language_model.", name)
