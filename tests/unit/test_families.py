"""A family that is registered from outside the package is read, counted, packed and converted as the package's own."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_papo.config import load_config
from megatron_papo.conversion.convert import convert
from megatron_papo.conversion.plan import Settings
from megatron_papo.conversion.verify import verify
from megatron_papo.conversion.workers import Workers
from megatron_papo.costs.flops import group_flops
from megatron_papo.costs.hardware import GPUS, Cluster
from megatron_papo.costs.memory import num_parameters, stage_memory
from megatron_papo.model import family
from megatron_papo.model.attention.rotary import mrope
from megatron_papo.model.parameter_map import assemble, fill_shard, parameter_names, parameter_table
from megatron_papo.model.positions import positions_of
from megatron_papo.model.shape import ModelShape, check_layout, padded
from megatron_papo.planning.assumptions import Assumptions
from megatron_papo.planning.ranking import LayoutPlan, plan
from megatron_papo.planning.workload import Workload
from tests.support.tiny import tiny_config
from tests.toy_family import costs
from tests.toy_family.reference import Toy, toy_config

TOY = toy_config()
SHAPE = ModelShape.from_dict(TOY.to_dict())


def test_the_refusal_of_an_unknown_family_names_the_known_ones():
    message = r"config.json: model_type: is 'other'; qwen2_5_vl, qwen3_vl, toy_vl are what this package trains"
    with pytest.raises(ValueError, match=message):
        ModelShape.from_dict({"model_type": "other"})


def _install(folder: Path, *, model_type: str, package: str) -> None:
    """What an installer leaves in `folder` of a distribution that declares a family."""
    info = folder / f"{package.partition('.')[0]}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {info.name.partition('-')[0]}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[megatron_papo.families]\n{model_type} = {package}\n")


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """A folder of installed distributions, of which nothing is remembered before and after."""
    monkeypatch.syspath_prepend(tmp_path)
    family.installed_families.cache_clear()
    yield tmp_path
    family.installed_families.cache_clear()


def test_an_installed_family_is_known_by_its_entry_point(installed):
    _install(installed, model_type="their_vl", package="their_models.their_vl")
    assert family.family_named("their_vl").package == "their_models.their_vl"
    assert family.family_named("qwen2_5_vl").package == "megatron_papo.model.qwen2_5_vl"


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "their_vl"])
def test_a_family_that_two_declare_is_refused(installed, model_type: str):
    for package in ("their_models", "other_models"):
        _install(installed, model_type=model_type, package=package)
    with pytest.raises(ValueError, match=f"entry points megatron_papo.families: {model_type}: both "):
        family.families()


def test_conversion_to_megatron_and_back_keeps_every_bit(tmp_path):
    Toy(toy_config(layers=1)).save_pretrained(tmp_path / "hf")
    memory, settings, workers = 8 * 2**30, Settings(file_bytes=100_000, box_bytes=20_000), Workers()
    convert("hf-to-megatron", tmp_path / "hf", tmp_path / "megatron", settings, memory, workers)
    convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "back", settings, memory, workers)
    before, after = (
        {name: tensor for file in (tmp_path / folder).glob("*.safetensors") for name, tensor in load_file(file).items()}
        for folder in ("hf", "back")
    )
    assert before.keys() == after.keys() and all(torch.equal(after[name], value) for name, value in before.items())
    for target, source in (("megatron", "hf"), ("back", "megatron")):
        verdict = verify(tmp_path / target, memory, workers, tmp_path / source)
        assert verdict.faults == [] and not verdict.inexact


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


def _layouts(shape: ModelShape) -> LayoutPlan:
    config = load_config(None, ["train.prompts_per_step=48"])
    cluster = Cluster(GPUS["H100"], 1, gpus_per_node=2)
    return plan(config, shape, cluster, Assumptions(), Workload.of(config, shape))


def test_layouts_are_planned_from_the_familys_own_costs(monkeypatch):
    shape = ModelShape.from_dict(toy_config(layers=6, width=2048, inner=8192).to_dict())
    layouts = _layouts(shape)
    best = layouts.best
    assert {estimate.candidate.tensor for estimate in layouts.fitting} == {1, 2}
    assert 0 < best.fullest.weights < best.peak and best.seconds["update"] > 0
    own = costs.vision_flops
    monkeypatch.setattr(costs, "vision_flops", lambda grids, shape: 10_000 * own(grids, shape))
    dearer = {estimate.candidate: estimate.seconds["update"] for estimate in _layouts(shape).fitting}
    assert dearer[best.candidate] > 1.5 * best.seconds["update"]


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


@pytest.mark.parametrize(("name", "interleaved"), [("qwen2_5_vl", False), ("qwen3_vl", True)])
def test_which_families_of_the_package_interleave(name: str, interleaved: bool):
    assert ModelShape.from_dict(tiny_config(name).to_dict()).language.interleaved_mrope is interleaved
