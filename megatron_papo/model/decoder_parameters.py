"""Parameter entries of a decoder whose tensors have Llama's names: `self_attn.q_proj`, `mlp.gate_proj`, `norm`.

Most language models that are published have these names, with their families' own prefix before them. Which layers have
biases and norms of heads follows from the shape.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_papo.model.parameter_map import (
    WORD_EMBEDDINGS,
    ParameterEntry,
    gated_entry,
    plain_entry,
    qkv_entry,
    vocabulary_entry,
)
from megatron_papo.model.shape import LanguageShape


def decoder_entries(shape: LanguageShape, prefix: str) -> Iterator[ParameterEntry]:
    """The entries of embedding, layers and last norm, in the model's order; `prefix` is what the published names begin
    with (`model.`). The MLPs are gated, and no linear layer but that of queries, keys and values has biases."""
    assert shape.mlp == "swiglu" and shape.norm == "rms" and not shape.linear_bias
    yield vocabulary_entry(WORD_EMBEDDINGS, f"{prefix}embed_tokens.weight", shape)
    hidden, ffn, heads = shape.hidden_size, shape.intermediate_size, shape.num_heads * shape.head_dim
    for layer in range(shape.num_layers):
        ours, theirs = f"language.decoder.layers.{layer}.", f"{prefix}layers.{layer}."
        yield plain_entry(ours + "input_layernorm.weight", theirs + "input_layernorm.weight", (hidden,))
        for kind, rest in (("weight", (hidden,)), *((("bias", ()),) if shape.qkv_bias else ())):
            names = [f"{theirs}self_attn.{part}_proj.{kind}" for part in "qkv"]
            yield qkv_entry(f"{ours}self_attention.linear_qkv.{kind}", names, shape, rest)
        for part in "qk" if shape.qk_norm else "":
            name = f"{ours}self_attention.{part}_layernorm.weight"
            yield plain_entry(name, f"{theirs}self_attn.{part}_norm.weight", (shape.head_dim,))
        yield plain_entry(
            ours + "self_attention.linear_proj.weight", theirs + "self_attn.o_proj.weight", (hidden, heads), axis=1
        )
        yield plain_entry(ours + "pre_mlp_layernorm.weight", theirs + "post_attention_layernorm.weight", (hidden,))
        gate, up = (f"{theirs}mlp.{part}_proj.weight" for part in ("gate", "up"))
        yield gated_entry(ours + "mlp.linear_fc1.weight", gate, up, ffn, (hidden,))
        yield plain_entry(ours + "mlp.linear_fc2.weight", theirs + "mlp.down_proj.weight", (hidden, ffn), axis=1)
    yield plain_entry("language.decoder.final_layernorm.weight", f"{prefix}norm.weight", (hidden,))
