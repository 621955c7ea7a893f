"""The count of parameters and bytes against the table of names, by hand, and what is refused with which numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from megatron_papo.config import Config, load_config
from megatron_papo.costs import activations, full_rows
from megatron_papo.costs.hardware import GPUS
from megatron_papo.costs.memory import (
    GIB,
    activation_bytes,
    checkpoint_bytes,
    memory_faults,
    memory_warnings,
    num_parameters,
    stage_memory,
)
from megatron_papo.logprobs.tiling import CUDA_TILE
from megatron_papo.model.layer_costs import ActivationSettings, LayerWidths, ParameterCount, layer_saved_bytes
from megatron_papo.model.parameter_map import parameter_table
from megatron_papo.model.published_shapes import published_config, published_models, shape_named
from megatron_papo.model.shape import ModelShape
from megatron_papo.preflight.layout_faults import faults_of_layout

EXAMPLES = Path(__file__).parents[2] / "examples"


def published(name: str) -> dict[str, Any]:
    """The published config.json of Qwen2.5-VL, 3B, 7B, 32B or 72B."""
    return published_config(f"Qwen2.5-VL-{name}")


def shape_of(name: str) -> ModelShape:
    return ModelShape.from_dict(published(name))


def recipe(name: str, *overrides: str) -> Config:
    return load_config(EXAMPLES / f"{name}.yaml", overrides)


@pytest.mark.parametrize(("name", "num"), published_models().items())
def test_parameters_are_those_of_the_table(name: str, num: int):
    shape = shape_named(name)
    assert num_parameters(shape) == sum(math.prod(entry.shape) for entry in parameter_table(shape).values()) == num


def test_bytes_of_the_3b_recipe_by_hand():
    """Two tensor ranks, four data ranks, one stage; tied embeddings; FFN 3420 of the tower padded to 3424."""
    (stage,) = stage_memory(recipe("papo_g_3b"), shape_of("3B"), 8)
    layer = (2048 + 512) * 2049 + 2048 * 2048 + 3 * 11008 * 2048
    tower = 3 * 1280 * 1281 + 1280 * 1280 + 2 * 3424 * 1281 + 3424 * 1280
    split = 36 * layer + 151936 * 2048 + 32 * tower + 5120 * 5121 + 2048 * 5120
    whole = 36 * 2 * 2048 + 2048 + 32 * 4 * 1280 + 1280 * 1176 + 1280 + 2048
    held = split // 2 + whole
    assert (stage.weights, stage.gradients, stage.optimizer) == (2 * held, 4 * held, 12 * held // 4)
    assert stage.engine == int(GPUS["H100"].memory_gib / 2 * GIB)


def test_frozen_parts_have_no_gradients_and_no_states():
    config = recipe("papo_g_3b", "model.freeze.language=true", "model.freeze.projector=true")
    (stage,) = stage_memory(config, shape_of("3B"), 8)
    tower = 3 * 1280 * 1281 + 1280 * 1280 + 2 * 3424 * 1281 + 3424 * 1280
    trained = 32 * tower // 2 + 32 * 4 * 1280 + 1280 * 1176
    assert (stage.gradients, stage.optimizer) == (4 * trained, 3 * trained)


def test_a_tied_matrix_lies_on_the_first_stage_and_on_the_last():
    one = stage_memory(recipe("papo_g_3b"), shape_of("3B"), 8)
    two = stage_memory(recipe("papo_g_3b", "parallel.pipeline=2"), shape_of("3B"), 8)
    assert sum(stage.weights for stage in two) - one[0].weights == 2 * 151936 * 2048 // 2


def test_what_cannot_fit_is_refused_with_the_numbers():
    words = ("parallel.tensor=1", "parallel.sequence=false", "cluster.nodes=1")
    assert memory_faults(recipe("papo_g_7b", *words), shape_of("7B"), 8) == [
        "generation.gpu_memory_fraction: 0.5 of 79.6 GiB is 39.8, and stage 0 of the trainer keeps 57.9 on the same "
        "GPU (weights 15.4, gradients 30.9, optimizer 11.6): the engine could neither wake after an update nor be "
        "started again; the largest that would do is 0.26"
    ]
    alone = [*words, "generation.placement=separate", "parallel.distributed_optimizer=false"]
    assert memory_faults(recipe("papo_g_7b", *alone), shape_of("7B"), 8) == [
        "cluster: stage 0 needs 139.0 GiB a GPU (weights 15.4, gradients 30.9, optimizer 92.7, engine 0.0), "
        "H100 has 79.6"
    ]
    engine = recipe("papo_g_7b", "generation.tensor=1", "generation.gpu_memory_fraction=0.1")
    assert memory_faults(engine, shape_of("7B"), 8) == [
        "generation.gpu_memory_fraction: 0.1 of 79.6 GiB is 8.0, the engine's weights alone take 15.4 "
        "(generation.tensor=1)"
    ]
    unknown = recipe("papo_g_7b", "cluster.gpu=MI300")
    assert memory_faults(unknown, shape_of("7B"), 8) == [
        "cluster.gpu: MI300 is none of A100-40GB, A100, H100, H200, B200; cluster.gpu_memory_gib says what it has"
    ]
    assert (
        memory_faults(recipe("papo_g_7b", "cluster.gpu=MI300", "cluster.gpu_memory_gib=192"), shape_of("7B"), 8) == []
    )


def test_an_engine_that_could_not_wake_is_refused_with_what_would_do():
    """3B on one H100 by hand: 18 bytes a parameter are 62.9 GiB, and 1 is CUDA's: 15.7 of 79.6 are left."""
    alone = ("parallel.tensor=1", "parallel.sequence=false", "cluster.nodes=1", "cluster.gpus_per_node=1")

    def faults(*more: str) -> list[str]:
        return memory_faults(recipe("papo_g_3b", *alone, *more), shape_of("3B"), 1)

    said = "generation.gpu_memory_fraction: 0.5 of 79.6 GiB is 39.8, and stage 0 of the trainer keeps 63.0"
    (fault,) = faults()
    assert fault.startswith(said) and fault.endswith("started again; the largest that would do is 0.19")
    assert faults("generation.gpu_memory_fraction=0.19") == []
    (fault,) = faults("generation.kv_cache_gib=20")
    assert fault.startswith("generation.kv_cache_gib: 20.0 beside 7.0 of weights is 27.0 GiB, and stage 0 ")
    assert fault.endswith("the largest that would do is 8.7") and faults("generation.kv_cache_gib=8.6") == []
    (fault,) = faults("generation.gpu_memory_fraction=0.2", "generation.dtype=float32", "cluster.gpu_memory_gib=70")
    assert "none would do, its weights alone take 14.0: what helps is more ranks" in fault
    assert faults("generation.placement=separate") == []


def test_where_states_and_engines_lie_changes_what_a_gpu_holds():
    (plain,) = stage_memory(recipe("papo_g_3b"), shape_of("3B"), 8)
    (aware,) = stage_memory(recipe("papo_g_3b", "optim.precision_aware=true"), shape_of("3B"), 8)
    assert aware.optimizer == plain.optimizer * 8 // 12  # 2 + 2 + 4 bytes for 4 + 4 + 4
    (half,) = stage_memory(recipe("papo_g_3b", "optim.offload_fraction=0.5"), shape_of("3B"), 8)
    assert half.optimizer == plain.optimizer // 2
    held = plain.weights + plain.gradients + plain.optimizer
    assert plain.engine_sleeps and plain.total == held + max(plain.engine, plain.activations)
    (awake,) = stage_memory(recipe("papo_g_3b", "generation.sleep=false"), shape_of("3B"), 8)
    assert awake.total == held + plain.engine + plain.activations
    (separate,) = stage_memory(recipe("papo_g_3b", "generation.placement=separate"), shape_of("3B"), 8)
    assert separate.engine == 0 and separate.total == held + plain.activations


def test_activations_that_may_not_fit_are_warned_of():
    config = recipe("papo_g_7b", "model.recompute=none", "train.tokens_per_micro_batch=65536")
    assert memory_faults(config, shape_of("7B"), 8) == []
    (warning,) = memory_warnings(config, shape_of("7B"), 8)
    assert warning.startswith("cluster: an update needs about 134.9 GiB a GPU on stage 0 (weights 3.9, gradients 7.7,")
    assert "H100 has 79.6, of which about 6 are for CUDA" in warning and "engine" not in warning
    beside = recipe("papo_g_7b", "generation.sleep=false", "generation.gpu_memory_fraction=0.62")
    assert memory_faults(beside, shape_of("7B"), 8) == []
    (warning,) = memory_warnings(beside, shape_of("7B"), 8)  # beside 23.2 of states: more than 73.6 with activations
    assert ", engine 49.4, activations " in warning


@pytest.mark.parametrize("recompute", ["none", "selective", "mlp", "full"])
@pytest.mark.parametrize("spec", ["local", "transformer_engine"])
def test_what_each_recomputation_keeps_is_as_by_hand(spec, recompute):
    """3B's second stage, 1000 tokens of which 500 are responses, two bytes a value, by hand from what a layer saves;
    norms within Transformer Engine's linears keep their outputs."""
    words = ("parallel.tensor=1", "parallel.sequence=false", "parallel.pipeline=2", "train.tokens_per_micro_batch=1000")
    config = recipe("papo_g_3b", *words, f"model.spec={spec}", f"model.recompute={recompute}")
    norms, outputs = 2 * (2 * 2048 + 4), 2 * 2 * 2048
    attention = 2 * (2048 + 256 + 256) + 2 * 2048 + 4 * 16  # queries, keys, values; output; log-sum-exp
    whole = norms + outputs + attention + 3 * 2 * 11008
    kept = {
        "none": whole,
        "selective": norms + (0 if spec == "local" else outputs) + attention + 2 * 2 * 11008,
        "mlp": norms + (0 if spec == "local" else outputs) + attention,
        "full": 2 * 2048,
    }[recompute]
    ends = 1000 * (4 * 128 + 2 * 2048 + 4) + 500 * 2 * 2048  # turns of positions, final norm, head
    # in backward: a layer's parts computed again (the tower's are smaller) and gradients in its MLP; or the head, whose
    # tile of logits has all 500 rows and four times 8192 words, with gradients of its weight and of a block of it
    again = 1000 * (whole - kept) + 2 * (1000 * 2 * (11008 + 2048) + 2 * 11008 * 2048)
    head = 2 * 151936 * 2048 + 4 * 2048 * (500 + 2 * 32768) + (4 + 2) * 500 * 32768
    assert activation_bytes(config, shape_of("3B"), 1) == 18_000 * kept + ends + max(again, head)


def test_a_stage_has_no_more_rows_in_flight_than_an_update_can_have():
    """Two prompts a rank and update, each of which may be cut into as many rows as five responses of 2,048 tokens need
    beside a prompt of 4,096; four stages."""
    few = ("train.prompts_per_step=24", "parallel.pipeline=4")
    config = recipe("papo_g_7b", *few)
    assert [full_rows.rows_in_flight(config, stage, 4) for stage in range(4)] == [2, 2, 2, 1]
    assert full_rows.rows_in_flight(recipe("papo_g_7b", "parallel.pipeline=4"), 0, 4) == 4
    short = recipe("papo_g_7b", *few, "train.tokens_per_micro_batch=9000")  # room for 4,904: three rows a prompt
    assert full_rows.rows_in_flight(short, 0, 4) == 4


def test_the_head_is_counted_with_the_tile_that_it_takes():
    assert activations.HEAD_TILE == CUDA_TILE


def test_a_checkpoint_is_fourteen_bytes_a_parameter():
    assert checkpoint_bytes(recipe("papo_g_3b"), shape_of("3B")) == 14 * 3754622976
    assert checkpoint_bytes(recipe("papo_g_3b", "model.dtype=float32"), shape_of("3B")) == 12 * 3754622976


def test_every_recipe_fits_the_nodes_it_names():
    for file in sorted(EXAMPLES.glob("[a-z]*_*b.yaml")):
        config = load_config(file)
        shape = shape_named(Path(config.model.path).name)
        assert memory_faults(config, shape, config.cluster.num_ranks) == [], file.name
        assert memory_warnings(config, shape, config.cluster.num_ranks) == [], file.name


@pytest.mark.parametrize(
    ("gpu", "fp8", "told"),
    [
        ("H100", "tensorwise", []),
        ("H100", "mxfp8", ["fp8.recipe: mxfp8 is none of what H100 computes: tensorwise, delayed, blockwise"]),
        ("A100", "tensorwise", ["fp8.recipe: tensorwise is none of what A100 computes: no FP8 at all"]),
        ("B200", "mxfp8", []),
    ],
)
def test_a_recipe_that_the_gpu_does_not_compute_is_refused(gpu, fp8, told):
    config = recipe("papo_g_7b", f"cluster.gpu={gpu}", f"fp8.recipe={fp8}")
    assert [line for line in faults_of_layout("train", config, shape_of("7B"), 8) if line.startswith("fp8")] == told


def test_a_layer_with_layernorm_and_a_plain_mlp_is_counted_as_by_hand():
    """Width 8, two heads of 6, FFN of 10 padded to 16, biases everywhere; bfloat16, two tensor ranks, nothing fused."""
    layer = LayerWidths(8, 2, 2, 6, 10, gated=False, qkv_bias=True, linear_bias=True, norm="layer")
    split = 3 * 12 * (8 + 1) + 12 * 8 + 16 * (8 + 1) + 8 * 16
    assert layer.parameters("language", 5, lambda width: 16) == ParameterCount("language", 5 * split, 5 * (4 * 8 + 16))
    settings = ActivationSettings(value_bytes=2, tensor=2, sequence=1, recompute="none", fused=False)
    norms, attention = 2 * (2 * 8 * 2 + 8), 2 * 2 * (6 + 6) + 4
    assert layer_saved_bytes(layer, settings) == norms + attention + 2 * (8 + 8)  # first linear's output, activated
