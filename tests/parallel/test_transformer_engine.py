"""The Transformer Engine spec, built of the real modules without a GPU: names, shapes and weights as the local spec's.

Skipped where Transformer Engine is not installed (`make transformer-engine` builds it beside the project's own
environment and runs this file there). It builds its layers only where torch says that CUDA is there, so that one
answer is changed while they are built; nothing here computes with them.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.ranks import run_ranks
from tests.support.tiny import make_tiny_folder

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is None, reason="needs Transformer Engine"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs these layers"),
]


def _build(folder: Path, spec: str, *overrides: str) -> tuple[Any, Any]:
    from megatron.core import parallel_state

    from megatron_papo.checkpoint.weight_loading import load_weights
    from megatron_papo.config import load_config
    from megatron_papo.distributed.accelerator import adapt_megatron, seed_all
    from megatron_papo.distributed.layout import initialize
    from megatron_papo.model.policy import build_policy
    from megatron_papo.model.shape import ModelShape

    config = load_config(None, [f"model.path={folder}", f"model.spec={spec}", "model.dtype=bfloat16", *overrides])
    adapt_megatron()
    if not parallel_state.model_parallel_is_initialized():
        initialize(config.parallel)
    seed_all(0)
    shape = ModelShape.from_folder(folder)
    available = torch.cuda.is_available
    torch.cuda.is_available = lambda: spec == "transformer_engine"
    try:
        model = build_policy(config, shape)
    finally:
        torch.cuda.is_available = available
    load_weights(model, shape, folder)
    return model, shape


def _both(folder: Path, *overrides: str) -> dict[str, Any]:
    from megatron_papo.distributed.layout import layout
    from megatron_papo.weights.held import global_parameters, held_parameters
    from megatron_papo.weights.transfer import hf_tensors

    found: dict[str, Any] = {}
    for spec in ("local", "transformer_engine"):
        model, shape = _build(folder, spec, *overrides)
        parameters = global_parameters(model)
        found[spec] = {
            "shapes": {name: tuple(parameter.shape) for name, parameter in parameters.items()},
            "marks": {
                name: (
                    getattr(parameter, "tensor_model_parallel", False),
                    getattr(parameter, "partition_dim", -1) if getattr(parameter, "tensor_model_parallel", 0) else -1,
                    getattr(parameter, "sequence_parallel", False),
                )
                for name, parameter in parameters.items()
            },
            "held": sorted(held_parameters(model, shape, layout().tensor_size)),
            "weights": {name: tensor.clone() for name, tensor in hf_tensors(model, shape)},
            "layers": [
                type(stack.decoder.layers[0].self_attention.linear_qkv).__name__
                for stack in (model.language, model.vision)
                if stack is not None
            ],
        }
    return found


TOWERS = {"qwen2_5_vl": "TELayerNormColumnParallelLinear", "qwen3_vl": "TEColumnParallelLinear"}
"""The layer of queries, keys and values in the tower: norms with biases stay apart from it."""


@pytest.mark.parametrize("family", TOWERS)
@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["parallel.tensor=2"],
        ["parallel.tensor=2", "parallel.sequence=true"],
        ["parallel.pipeline=2"],
    ],
    ids=["TP1", "TP2", "TP2+SP", "PP2"],
)
def test_names_shapes_marks_and_weights_equal_the_local_specs(tmp_path, overrides, family):
    folder = make_tiny_folder(tmp_path / "model", family=family)
    for found in run_ranks(_both, 1 if not overrides else 2, folder, *overrides):
        local, engine = found["local"], found["transformer_engine"]
        assert set(local.pop("layers")) == {"RoundedColumnLinear"}
        language, *tower = engine.pop("layers")
        assert language == "TELayerNormColumnParallelLinear"
        assert tower in ([], [TOWERS[family]])  # a later stage has none
        ours, theirs = local.pop("weights"), engine.pop("weights")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        for part in ("shapes", "held", "marks"):
            assert local[part] == engine[part], part


def _contexts(folder: Path, recipe: str) -> dict[str, Any]:
    """By layer of the language model and of the tower (from 1): the kind of context that Megatron-Core enters."""
    from megatron.core.fp8_utils import get_fp8_context

    from megatron_papo.config import load_config
    from megatron_papo.distributed.accelerator import adapt_megatron
    from megatron_papo.model.shape import ModelShape
    from megatron_papo.model.transformer_config import language_config, vision_config

    whole = ["fp8.first_layers=0", "fp8.last_layers=0"] if recipe == "delayed" else []
    config = load_config(None, [f"model.path={folder}", f"fp8.recipe={recipe}", "fp8.vision=true", *whole])
    adapt_megatron()
    available = torch.cuda.is_available
    torch.cuda.is_available = lambda: True
    try:
        shape = ModelShape.from_folder(folder)
        found = {}
        for name, make in (("language", language_config), ("vision", vision_config)):
            made = make(config, shape, "transformer_engine")
            found[name] = [type(get_fp8_context(made, layer)).__name__ for layer in range(made.num_layers)]
            found[f"{name} recipe"] = (made.fp8, str(made.fp8_recipe), made.fp8_param)
        return found
    finally:
        torch.cuda.is_available = available


@pytest.mark.parametrize(
    ("recipe", "numbers"), [("tensorwise", "hybrid"), ("delayed", "hybrid"), ("blockwise", "e4m3"), ("mxfp8", "e4m3")]
)
def test_every_recipe_is_one_of_megatrons_and_the_outer_layers_stay_out(tmp_path, recipe, numbers):
    folder = make_tiny_folder(tmp_path / "model", layers=4)
    (found,) = run_ranks(_contexts, 1, folder, recipe)
    assert found["language recipe"] == found["vision recipe"] == (numbers, recipe, False)
    inside = ["autocast"] * 4 if recipe == "delayed" else ["nullcontext", "autocast", "autocast", "nullcontext"]
    assert found["language"] == inside
    assert set(found["vision"]) == {"autocast"}
