"""Name tables on plain tensors: slicing and assembling are each other's inverse, whatever the tensor parallelism."""

import json
from functools import cache

import pytest
import torch
from transformers import AutoModelForImageTextToText

from megatron_papo.model.family import FAMILIES
from megatron_papo.model.parameter_map import (
    ParameterEntry,
    ParametersModule,
    assemble,
    blocks,
    fill_shard,
    parameter_names,
    parameter_table,
    table_name,
)
from megatron_papo.model.shape import ModelShape
from tests.support.tiny import tiny_config, tiny_model

SHAPE = {"layers": 2, "heads": 12, "kv_heads": 2, "hidden": 96, "vision_intermediate": 42, "vocab": 275}
VISION = {"vision_hidden": 64, "vision_heads": 8}

Table = dict[str, ParameterEntry]


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def table(family) -> Table:
    return _table(family)


@pytest.fixture
def names(family) -> ParametersModule:
    return parameter_names(_shape(family))


@pytest.fixture
def tensors(family) -> dict[str, torch.Tensor]:
    return _tensors(family)


def _shape(family: str, *, tie: bool = False) -> ModelShape:
    return ModelShape.from_dict(json.loads(tiny_config(family, **SHAPE, **VISION, tie=tie).to_json_string()))


@cache
def _table(family: str) -> Table:
    return parameter_table(_shape(family))


@cache
def _tensors(family: str) -> dict[str, torch.Tensor]:
    """Of transformers' model, by published name."""
    published_name = parameter_names(_shape(family)).published_name
    model = tiny_model(tiny_config(family, **SHAPE, **VISION))
    return {published_name(name): tensor for name, tensor in model.state_dict().items()}


def _shards(entry: ParameterEntry, tensors: dict[str, torch.Tensor], size: int) -> list[torch.Tensor]:
    shape = list(entry.shape)
    if entry.axis is not None:
        part = -(-shape[entry.axis] // entry.parts // size)  # rounded up: what does not divide is padded
        shape[entry.axis] = part * entry.parts
    shards = [torch.full(shape, torch.nan) for _ in range(size)]
    for rank, shard in enumerate(shards):
        fill_shard(entry, shard, rank, lambda name, index: tensors[name][index])
    return shards


@pytest.mark.parametrize("tie", [False, True])
def test_the_table_covers_the_model_exactly(family, tie):
    shape = _shape(family, tie=tie)
    names = parameter_names(shape)
    named = [(source.name, source.shape) for entry in parameter_table(shape).values() for source in entry.sources]
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(tiny_config(family, **SHAPE, **VISION, tie=tie))
    expected = [(names.published_name(name), tuple(weight.shape)) for name, weight in model.named_parameters()]
    assert sorted(named) == sorted(expected), "every tensor once"


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_round_trip(table, tensors, size):
    for entry in table.values():
        for source, tensor in zip(entry.sources, assemble(entry, _shards(entry, tensors, size))):
            assert torch.equal(tensor, tensors[source.name]), f"{source.name} at {size} ranks"


def test_shards_hold_what_megatron_expects(family, table, tensors):
    """Written out by hand for 12 query heads in 2 groups, heads of 8, FFN 192, vocabulary 275."""
    layer = "language.decoder.layers.1."
    text, vision = {"qwen2_5_vl": ("model.", "visual.")}.get(family, ("model.language_model.", "model.visual."))
    q, k, v = (tensors[f"{text}layers.1.self_attn.{part}_proj.weight"] for part in "qkv")
    whole = torch.cat([q[:48], k[:8], v[:8], q[48:], k[8:], v[8:]])
    # four ranks for two groups: a contiguous quarter each, which ends inside a group
    for size in (1, 2, 4):
        for rank, shard in enumerate(_shards(table[layer + "self_attention.linear_qkv.weight"], tensors, size)):
            assert torch.equal(shard, whole.chunk(size)[rank])

    gate, up = (tensors[f"{text}layers.1.mlp.{part}_proj.weight"] for part in ("gate", "up"))
    shard = _shards(table[layer + "mlp.linear_fc1.weight"], tensors, 2)[1]
    assert torch.equal(shard, torch.cat([gate[96:], up[96:]]))
    down = tensors[f"{text}layers.1.mlp.down_proj.weight"]
    assert torch.equal(_shards(table[layer + "mlp.linear_fc2.weight"], tensors, 2)[1], down[:, 96:])

    fused = tensors[f"{vision}blocks.0.attn.qkv.weight"].view(3, 8, 8, 64)  # 8 heads of 8
    shard = _shards(table["vision.decoder.layers.0.self_attention.linear_qkv.weight"], tensors, 2)[1]
    assert torch.equal(shard, fused[:, 4:].transpose(0, 1).reshape(96, 64))

    embedding = _shards(table["language.embedding.word_embeddings.weight"], tensors, 2)[1]
    assert torch.equal(embedding[:137], tensors[f"{text}embed_tokens.weight"][138:])
    assert torch.equal(embedding[137:], torch.zeros(1, 96))


def test_padding_of_a_gated_layer_is_at_the_end_of_each_half():
    """Vision FFN 42 on 8 ranks: 6 a rank, the last rank holds none of it."""
    table, tensors = _table("qwen2_5_vl"), _tensors("qwen2_5_vl")
    gate, up = (tensors[f"visual.blocks.0.mlp.{part}_proj.bias"] for part in ("gate", "up"))
    shards = _shards(table["vision.decoder.layers.0.mlp.linear_fc1.bias"], tensors, 8)
    assert torch.equal(shards[6], torch.cat([gate[36:], up[36:]]))
    assert torch.equal(shards[7], torch.zeros(12))
    four = _shards(table["vision.decoder.layers.0.mlp.linear_fc1.bias"], tensors, 4)[3]
    zeros = torch.zeros(2)
    assert torch.equal(four, torch.cat([gate[33:], zeros, up[33:], zeros]))


def test_mergers_of_every_level_are_split_and_position_embeddings_are_not():
    """Written out by hand for a tower of 64 with two levels: blocks of 256, tokens of 96, a grid of 6 x 6."""
    table, tensors = _table("qwen3_vl"), _tensors("qwen3_vl")
    for ours, theirs, norm in (
        ("merger", "merger", 64),
        ("deepstack_mergers.0", "deepstack_merger_list.0", 256),
        ("deepstack_mergers.1", "deepstack_merger_list.1", 256),
    ):
        fc1, fc2 = (tensors[f"model.visual.{theirs}.linear_fc{number}.weight"] for number in (1, 2))
        assert torch.equal(_shards(table[f"vision.{ours}.linear_fc1.weight"], tensors, 2)[1], fc1[128:])
        assert torch.equal(_shards(table[f"vision.{ours}.linear_fc2.weight"], tensors, 2)[1], fc2[:, 128:])
        assert table[f"vision.{ours}.norm.bias"].shape == (norm,)
    for shard in _shards(table["vision.position_embed.weight"], tensors, 2):
        assert shard.shape == (36, 64) and torch.equal(shard, tensors["model.visual.pos_embed.weight"])


def test_a_rank_reads_only_its_part(table, tensors):
    for name in ("mlp.linear_fc1.weight", "mlp.linear_fc2.weight", "self_attention.linear_qkv.weight"):
        entry = table[f"language.decoder.layers.0.{name}"]
        shape = list(entry.shape)
        shape[entry.axis] //= 4
        read = sum(tensors[entry.sources[b.source].name][b.source_index].numel() for b in blocks(entry, shape, 2))
        assert read == torch.Size(entry.shape).numel() // 4


@pytest.mark.parametrize(
    ("family", "written", "published"),
    [
        ("qwen2_5_vl", "model.language_model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
        ("qwen2_5_vl", "model.visual.merger.ln_q.weight", "visual.merger.ln_q.weight"),
        ("qwen3_vl", "language_model.norm.weight", "model.language_model.norm.weight"),
        ("qwen3_vl", "visual.pos_embed.weight", "model.visual.pos_embed.weight"),
    ],
)
def test_published_names(names, written, published):
    assert names.published_name(written) == published


def test_both_forms_of_hugging_face_names(family, names, tensors):
    in_memory = set(tiny_model(tiny_config(family, **SHAPE, **VISION)).state_dict())
    assert {names.module_name(name) for name in tensors} == in_memory
    assert {names.published_name(name) for name in tensors} == set(tensors)


def test_fused_norms_are_the_same_parameters():
    for fused, plain in (("self_attention.linear_qkv.", "input_"), ("mlp.linear_fc1.", "pre_mlp_")):
        name = f"language.decoder.layers.7.{fused}layer_norm_weight"
        assert table_name(name) == f"language.decoder.layers.7.{plain}layernorm.weight"
    assert table_name("vision.merger.norm.weight") == "vision.merger.norm.weight"
