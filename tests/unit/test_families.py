"""A family that is registered from outside the package is read, counted, packed and converted as the package's own."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_papo.config import load_config
from megatron_papo.costs.flops import group_flops
from megatron_papo.costs.memory import num_parameters, stage_memory
from megatron_papo.model.attention.rotary import mrope
from megatron_papo.model.parameter_map import assemble, fill_shard, parameter_names, parameter_table
from megatron_papo.model.positions import positions_of
from megatron_papo.model.shape import ModelShape, check_layout, padded
from tests.support.tiny import tiny_config
from tests.toy_family.reference import Toy, toy_config

TOY = toy_config()
SHAPE = ModelShape.from_dict(TOY.to_dict())


def test_the_refusal_of_an_unknown_family_names_the_known_ones():
    message = r"config.json: model_type: is 'other'; qwen2_5_vl, toy_vl are what this package trains"
    with pytest.raises(ValueError, match=message):
        ModelShape.from_dict({"model_type": "other"})


@pytest.mark.parametrize("tie", [False, True])
def test_the_table_has_every_tensor_of_the_reference_and_costs_count_them(tie: bool):
    config = toy_config(tie=tie)
    shape, state = ModelShape.from_dict(config.to_dict()), Toy(config).state_dict()
    table = parameter_table(shape)
    sources = {source.name: source.shape for entry in table.values() for source in entry.sources}
    assert sources == {parameter_names(shape).published_name(name): tuple(value.shape) for name, value in state.items()}
    assert num_parameters(shape) == sum(math.prod(entry.shape) for entry in table.values())


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_shards_give_the_tensors_back(tensor: int):
    state = Toy(TOY).state_dict()
    for entry in parameter_table(SHAPE).values():
        size = list(entry.shape)
        if entry.axis is not None:
            width = entry.parts * padded(size[entry.axis] // entry.parts, tensor)
            size[entry.axis] = (width if width % tensor == 0 else size[entry.axis]) // tensor
        shards = [torch.empty(size) for _ in range(tensor)]
        for rank, shard in enumerate(shards):
            fill_shard(entry, shard, rank, lambda name, index: state[name][index])
        for source, tensor_back in zip(entry.sources, assemble(entry, shards)):
            assert torch.equal(tensor_back, state[source.name])


def test_memory_and_flops_are_counted():
    config = load_config(None, ["parallel.tensor=2", "model.dtype=float32"])
    check_layout(config, SHAPE, 2)
    (stage,) = stage_memory(config, SHAPE, 2)
    assert stage.counted > 0
    with_image = group_flops(20, [5], [(1, 4, 4)], SHAPE)
    assert with_image.vision > group_flops(20, [5], [], SHAPE).vision == 0


def test_positions_come_from_the_family():
    image = SHAPE.image_token_id
    positions = positions_of(SHAPE)(torch.tensor([7, image, image, 8]), torch.tensor([[1, 2, 4]]))
    assert positions.tolist() == [[0, 1, 1, 4], [0, 1, 1, 4], [0, 1, 2, 4]]
    with pytest.raises(ValueError, match="3 image tokens in a run"):
        positions_of(SHAPE)(torch.tensor([image] * 3), torch.tensor([[1, 2, 4]]))


@pytest.mark.parametrize("sections", [(24, 20, 20), (6, 3, 3), (4, 4, 4)])
def test_interleaved_sections_are_those_of_transformers(sections: tuple[int, int, int]):
    from transformers import Qwen3VLTextConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

    dim, theta = 2 * sum(sections), 10_000.0
    rope = {"rope_type": "default", "rope_theta": theta, "mrope_section": list(sections)}
    positions = torch.randint(0, 900, (3, 11), generator=torch.Generator().manual_seed(0))
    theirs = Qwen3VLTextRotaryEmbedding(Qwen3VLTextConfig(head_dim=dim, rope_parameters=rope))
    cos, sin = (each[0, :, : dim // 2] for each in theirs(torch.empty(0), positions[:, None]))
    rotation = mrope(positions, head_dim=dim, theta=theta, sections=sections, interleaved=True)
    assert torch.equal(rotation.cos_T1F[:, 0], cos)
    assert torch.equal(rotation.sin_T1F[:, 0], sin)
    in_runs = mrope(positions, head_dim=dim, theta=theta, sections=sections)
    assert not torch.allclose(in_runs.cos_T1F, rotation.cos_T1F, atol=1e-2)


def test_a_family_of_the_package_is_not_interleaved():
    assert not ModelShape.from_dict(tiny_config().to_dict()).language.interleaved_mrope
