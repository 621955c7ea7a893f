"""The name table on plain tensors: slicing and assembling are each other's inverse, whatever the tensor parallelism."""

import json

import pytest
import torch

from megatron_papo.model.parameter_map import ParameterEntry, assemble, blocks, fill_shard, parameter_table, table_name
from megatron_papo.model.qwen2_5_vl.parameters import module_name, published_name
from megatron_papo.model.shape import ModelShape
from tests.support.tiny import tiny_config, tiny_model

SHAPE = {"layers": 2, "heads": 12, "kv_heads": 2, "hidden": 96, "vision_intermediate": 42, "vocab": 275}
CONFIG = tiny_config(**SHAPE, vision_hidden=64, vision_heads=8)
TABLE = parameter_table(ModelShape.from_dict(json.loads(CONFIG.to_json_string())))


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return {published_name(name): tensor for name, tensor in tiny_model(CONFIG).state_dict().items()}


def _shards(entry: ParameterEntry, tensors: dict[str, torch.Tensor], size: int) -> list[torch.Tensor]:
    shape = list(entry.shape)
    if entry.axis is not None:
        part = -(-shape[entry.axis] // entry.parts // size)  # rounded up: what does not divide is padded
        shape[entry.axis] = part * entry.parts
    shards = [torch.full(shape, torch.nan) for _ in range(size)]
    for rank, shard in enumerate(shards):
        fill_shard(entry, shard, rank, lambda name, index: tensors[name][index])
    return shards


def test_the_table_covers_the_model_exactly(tensors):
    named = {source.name: source.shape for entry in TABLE.values() for source in entry.sources}
    assert named == {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_round_trip(tensors, size):
    for entry in TABLE.values():
        for source, tensor in zip(entry.sources, assemble(entry, _shards(entry, tensors, size))):
            assert torch.equal(tensor, tensors[source.name]), f"{source.name} at {size} ranks"


def test_shards_hold_what_megatron_expects(tensors):
    """Written out by hand for 12 query heads in 2 groups, heads of 8, FFN 192, vocabulary 275."""
    layer = "language.decoder.layers.1."
    q, k, v = (tensors[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkv")
    whole = torch.cat([q[:48], k[:8], v[:8], q[48:], k[8:], v[8:]])
    # four ranks for two groups: a contiguous quarter each, which ends inside a group
    for size in (1, 2, 4):
        for rank, shard in enumerate(_shards(TABLE[layer + "self_attention.linear_qkv.weight"], tensors, size)):
            assert torch.equal(shard, whole.chunk(size)[rank])

    gate, up = (tensors[f"model.layers.1.mlp.{part}_proj.weight"] for part in ("gate", "up"))
    shard = _shards(TABLE[layer + "mlp.linear_fc1.weight"], tensors, 2)[1]
    assert torch.equal(shard, torch.cat([gate[96:], up[96:]]))
    down = tensors["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(_shards(TABLE[layer + "mlp.linear_fc2.weight"], tensors, 2)[1], down[:, 96:])

    fused = tensors["visual.blocks.0.attn.qkv.weight"].view(3, 8, 8, 64)  # 8 heads of 8
    shard = _shards(TABLE["vision.decoder.layers.0.self_attention.linear_qkv.weight"], tensors, 2)[1]
    assert torch.equal(shard, fused[:, 4:].transpose(0, 1).reshape(96, 64))

    embedding = _shards(TABLE["language.embedding.word_embeddings.weight"], tensors, 2)[1]
    assert torch.equal(embedding[:137], tensors["model.embed_tokens.weight"][138:])
    assert torch.equal(embedding[137:], torch.zeros(1, 96))


def test_padding_of_a_gated_layer_is_at_the_end_of_each_half(tensors):
    """Vision FFN 42 on 8 ranks: 6 a rank, the last rank holds none of it."""
    gate, up = (tensors[f"visual.blocks.0.mlp.{part}_proj.bias"] for part in ("gate", "up"))
    shards = _shards(TABLE["vision.decoder.layers.0.mlp.linear_fc1.bias"], tensors, 8)
    assert torch.equal(shards[6], torch.cat([gate[36:], up[36:]]))
    assert torch.equal(shards[7], torch.zeros(12))
    four = _shards(TABLE["vision.decoder.layers.0.mlp.linear_fc1.bias"], tensors, 4)[3]
    zeros = torch.zeros(2)
    assert torch.equal(four, torch.cat([gate[33:], zeros, up[33:], zeros]))


def test_a_rank_reads_only_its_part(tensors):
    for name in ("mlp.linear_fc1.weight", "mlp.linear_fc2.weight", "self_attention.linear_qkv.weight"):
        entry = TABLE[f"language.decoder.layers.0.{name}"]
        shape = list(entry.shape)
        shape[entry.axis] //= 4
        read = sum(tensors[entry.sources[b.source].name][b.source_index].numel() for b in blocks(entry, shape, 2))
        assert read == torch.Size(entry.shape).numel() // 4


def test_tied_embeddings_have_no_head_of_their_own():
    shape = ModelShape.from_dict(json.loads(tiny_config(tie=True).to_json_string()))
    assert "language.output_layer.weight" not in parameter_table(shape)


def test_both_forms_of_hugging_face_names(tensors):
    assert published_name("model.language_model.layers.3.mlp.up_proj.weight") == "model.layers.3.mlp.up_proj.weight"
    assert published_name("model.visual.merger.ln_q.weight") == "visual.merger.ln_q.weight"
    in_memory = set(tiny_model(CONFIG).state_dict())
    assert {module_name(name) for name in tensors} == in_memory
    assert {published_name(name) for name in tensors} == set(tensors)


def test_fused_norms_are_the_same_parameters():
    for fused, plain in (("self_attention.linear_qkv.", "input_"), ("mlp.linear_fc1.", "pre_mlp_")):
        name = f"language.decoder.layers.7.{fused}layer_norm_weight"
        assert table_name(name) == f"language.decoder.layers.7.{plain}layernorm.weight"
    assert table_name("vision.merger.norm.weight") == "vision.merger.norm.weight"
