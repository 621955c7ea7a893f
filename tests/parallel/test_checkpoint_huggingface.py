"""Hugging Face folders into real Megatron models and back, bit for bit at every layout; planted faults."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from megatron_papo.config import Config, load_config
from megatron_papo.distributed.accelerator import adapt_megatron
from megatron_papo.model.shape import ModelShape
from megatron_papo.weights.transfer import hf_tensors, read_hf, write_hf
from tests.support.ranks import run_ranks
from tests.support.tiny import make_tiny_folder

SHAPE = {"hidden": 64, "layers": 3, "heads": 4, "kv_heads": 2, "vision_depth": 2, "vocab": 275}
VISION = {"vision_hidden": 32, "vision_heads": 4, "vision_intermediate": 42}  # 42: padded at every layout
FAMILIES = {"qwen2_5_vl": {}, "qwen3_vl": {"head_dim": 24}}
"""What else the model of each family has."""
LAYOUTS = {"TP1": (1, 1), "TP2": (2, 1), "PP2": (1, 2), "TP2xPP2": (2, 2), "TP4, 2 key-value heads": (4, 1)}


@pytest.fixture(scope="module")
def every(tmp_path_factory) -> dict[str, dict[str, Path]]:
    """The folders of each family: fp32 in several files and its bf16 copy in one; one with tied embeddings."""
    found = {}
    for family, more in FAMILIES.items():
        root, sizes = tmp_path_factory.mktemp(family), {"family": family, **SHAPE, **VISION, **more}
        full = make_tiny_folder(root / "float32", **sizes, max_shard_size="100KB")
        tied = make_tiny_folder(root / "tied", **sizes, tie=True)
        half = root / "bfloat16"
        shutil.copytree(full, half, ignore=shutil.ignore_patterns("*.safetensors*"))
        save_file({name: tensor.bfloat16() for name, tensor in _tensors(full).items()}, half / "model.safetensors")
        found[family] = {"float32": full, "bfloat16": half, "tied": tied}
    return found


@pytest.fixture(scope="module")
def folders(every) -> dict[str, Path]:
    """Of the first family."""
    return every["qwen2_5_vl"]


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def _start(layout: tuple[int, int], dtype: str) -> Config:
    from megatron_papo.distributed.layout import initialize

    adapt_megatron()
    tensor, pipeline = layout
    config = load_config(
        None, [f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}", f"model.dtype={dtype}", "model.spec=local"]
    )
    initialize(config.parallel)
    return config


def _model(folder: Path, config: Config):
    from megatron_papo.model.policy import build_policy

    shape = ModelShape.from_folder(folder)
    return build_policy(config, shape), shape


def _round_trips(folders: list[tuple[Path, Path]], layout: tuple[int, int], dtype: str) -> list[list[str]]:
    """Of each source to its target: what was handed over."""
    config = _start(layout, dtype)
    return [_round_trip(source, target, config) for source, target in folders]


def _round_trip(source: Path, target: Path, config: Config) -> list[str]:
    model, shape = _model(source, config)
    read_hf(model, shape, source)
    write_hf(model, shape, target, source)
    heard = []
    for bucket_bytes in (64 * 2**20, 1, 30_000):  # all of a stage, one parameter, several
        named = hf_tensors(model, shape, module_names=True, bucket_bytes=bucket_bytes)
        heard.append([f"{name} {tensor.double().sum().item()} {tuple(tensor.shape)}" for name, tensor in named])
    assert heard[0] == heard[1] == heard[2]
    return heard[0]


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [("float32", layout) for layout in LAYOUTS] + [("bfloat16", "TP2xPP2"), ("tied", "TP1"), ("tied", "TP2xPP2")],
)
def test_round_trip_is_bit_exact(every, tmp_path, layout, dtype):
    layout = tensor, pipeline = LAYOUTS[layout]
    folders = [(every[family][dtype], tmp_path / family) for family in FAMILIES]
    results = run_ranks(_round_trips, tensor * pipeline, folders, layout, dtype.replace("tied", "float32"))
    assert all(result == results[0] for result in results), "every rank of the group sees the same tensors"
    for heard, (source, target) in zip(results[0], folders, strict=True):
        expected, written = _tensors(source), _tensors(target)
        assert len(heard) == len(expected)
        assert written.keys() == expected.keys()
        for name, tensor in expected.items():
            assert written[name].dtype == tensor.dtype
            assert torch.equal(written[name], tensor), name


def test_transformers_loads_what_was_written(every, tmp_path):
    folders = [(every[family]["tied"], tmp_path / family) for family in FAMILIES]
    (results, _) = run_ranks(_round_trips, 2, folders, (2, 1), "float32")
    for heard, (source, target) in zip(results, folders, strict=True):
        loaded = [
            AutoModelForImageTextToText.from_pretrained(
                folder, dtype="auto", output_loading_info=True, trust_remote_code=False
            )
            for folder in (source, target)
        ]
        assert not any(value for _, report in loaded for value in report.values())
        original, written = (model.state_dict() for model, _ in loaded)
        assert all(torch.equal(tensor, original[name]) for name, tensor in written.items())
        assert {line.split()[0] for line in heard} == set(original) - {"lm_head.weight"}, "names of the module itself"
        assert {file.name for file in target.iterdir()} == {file.name for file in source.iterdir()}


def test_config_of_an_export_names_the_dtype_that_was_written(folders, tmp_path):
    run_ranks(_round_trips, 1, [(folders["float32"], tmp_path / "out")], (1, 1), "bfloat16")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    reference = {name: tensor.bfloat16() for name, tensor in _tensors(folders["float32"]).items()}
    assert all(torch.equal(tensor, reference[name]) for name, tensor in _tensors(tmp_path / "out").items())


def _fault(source: str) -> str:
    model, shape = _model(Path(source), _start((2, 1), "float32"))
    try:
        read_hf(model, shape, source)
    except ValueError as error:
        return str(error)
    return "no error"


def _missing(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


def _extra(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file({**tensors, "model.layers.3.mlp.up_proj.weight": torch.zeros(2, 2)}, folder / "model.safetensors")


def _misshapen(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    name = "visual.blocks.1.attn.qkv.bias"
    save_file({**tensors, name: tensors[name][:-1].clone()}, folder / "model.safetensors")


def _truncated(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1000])


def _no_file(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("plant", "told"),
    [
        (_missing, ["model.layers.1.mlp.up_proj.weight (128, 64): missing"]),
        (_extra, ["model.safetensors: model.layers.3.mlp.up_proj.weight (2, 2): no such tensor"]),
        (_misshapen, ["model.safetensors: visual.blocks.1.attn.qkv.bias: expected shape (96,), found (95,)"]),
        (_truncated, ["model.safetensors: ", "truncated: not a whole safetensors file"]),
        (_no_file, ["model.safetensors.index.json: names files that are not there: model-00001-of-00002.safetensors"]),
    ],
)
def test_planted_faults_are_named_on_every_rank(folders, tmp_path, plant, told):
    shutil.copy(folders["float32"] / "config.json", tmp_path)
    plant(tmp_path, _tensors(folders["float32"]))
    for message in run_ranks(_fault, 2, str(tmp_path)):
        assert all(part in message for part in told), message
        assert len(message.splitlines()) == 1


def _most_bytes_alive(source: str, layout: tuple[int, int]) -> tuple[int, int, int]:
    """Of all tensors handed out so far, at any moment, in buckets of a third of the largest; of the largest parameter;
    of the whole model."""
    model, shape = _model(Path(source), _start(layout, "float32"))
    read_hf(model, shape, source)
    handed_out: list[weakref.ref[torch.Tensor]] = []
    sizes, alive = [], 0
    largest = max(tensor.nbytes for _, tensor in hf_tensors(model, shape))
    for _, tensor in hf_tensors(model, shape, bucket_bytes=largest // 3):
        handed_out.append(weakref.ref(tensor))
        sizes.append(tensor.nbytes)
        alive = max(alive, sum(left.nbytes for held in handed_out if (left := held()) is not None))
    return alive, max(sizes), sum(sizes)


@pytest.mark.parametrize("layout", ["TP1", "TP2xPP2"])
def test_weights_are_handed_over_without_a_second_copy_of_the_model(layout, folders):
    tensor, pipeline = LAYOUTS[layout]
    results = run_ranks(_most_bytes_alive, tensor * pipeline, str(folders["float32"]), LAYOUTS[layout])
    for alive, largest, whole in results:
        assert alive <= 3 * largest and alive < whole / 3  # one bucket, and the one before it
