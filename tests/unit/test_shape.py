"""Reading config.json in both layouts, and refusing what cannot be laid out."""

import copy
import json
import subprocess

import pytest

from megatron_papo.config import ConfigError, load_config
from megatron_papo.model.published_shapes import published_config
from megatron_papo.model.shape import ModelShape, check_layout, padded, stage_layers
from tests.support.interpreter import PYTHON

PUBLISHED_3B = {
    "model_type": "qwen2_5_vl",
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "sliding_window": 32768,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_config": {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 2048,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "temporal_patch_size": 2,
    },
}


def changed(path: str, value, tree: dict = PUBLISHED_3B) -> dict:
    """The tree with another value at `path`; None: without that key."""
    tree = copy.deepcopy(tree)
    *sections, key = path.split(".")
    inner = tree
    for section in sections:
        inner = inner[section]
    if value is None:
        del inner[key]
    else:
        inner[key] = value
    return tree


def test_the_published_flat_layout():
    shape = ModelShape.from_dict(PUBLISHED_3B)
    assert (shape.language.num_layers, shape.language.num_kv_heads, shape.language.head_dim) == (36, 2, 128)
    assert (shape.language.rope_theta, shape.language.mrope_section) == (1e6, (16, 24, 24))
    assert (shape.vision.num_layers, shape.vision.head_dim, shape.vision.patch_dim) == (32, 80, 1176)
    assert shape.vision.full_attention_layers == (7, 15, 23, 31)
    assert shape.tie_word_embeddings
    assert shape.vision_token_ids == (151652, 151653, 151655, 151656)


def test_what_transformers_writes_reads_as_the_same_shape(tmp_path):
    from transformers import Qwen2_5_VLConfig

    (tmp_path / "flat").mkdir()
    (tmp_path / "flat/config.json").write_text(json.dumps(PUBLISHED_3B))
    Qwen2_5_VLConfig.from_pretrained(tmp_path / "flat").save_pretrained(tmp_path / "nested")
    assert "text_config" in json.loads((tmp_path / "nested/config.json").read_text())
    assert ModelShape.from_folder(tmp_path / "nested") == ModelShape.from_dict(PUBLISHED_3B)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("hidden_size", None, "config.json: hidden_size: missing"),
        ("vision_config.depth", None, "config.json: vision_config.depth: missing"),
        ("vision_config", None, "config.json: vision_config: missing"),
        ("num_hidden_layers", "36", "config.json: num_hidden_layers: is '36', not int"),
        ("num_hidden_layers", 0, "config.json: num_hidden_layers: is 0, must be at least 1"),
        ("model_type", "qwen4_vl", "config.json: model_type: is 'qwen4_vl'"),
        ("num_attention_heads", 15, "config.json: num_attention_heads: hidden_size 2048 does not divide by 15"),
        ("num_key_value_heads", 3, "config.json: num_key_value_heads: 3 does not divide 16"),
        ("rope_scaling", {"type": "yarn"}, "config.json: rope_scaling.rope_type: is 'yarn'"),
        ("rope_scaling", {"type": "mrope", "mrope_section": [1, 2]}, "config.json: rope_scaling.mrope_section: is [1"),
        ("rope_scaling", {"mrope_section": [9, 9, 9]}, "config.json: rope_scaling.mrope_section: [9, 9, 9] do not "),
        ("use_sliding_window", True, "config.json: use_sliding_window: "),
        ("vision_config.out_hidden_size", 99, "config.json: vision_config.out_hidden_size: "),
        ("vision_config.hidden_act", "gelu", "config.json: vision_config.hidden_act: is 'gelu'"),
        ("vision_config.fullatt_block_indexes", 7, "config.json: vision_config.fullatt_block_indexes: is 7, not list"),
    ],
)
def test_faults_name_file_and_key(path, value, message):
    with pytest.raises(ValueError) as caught:
        ModelShape.from_dict(changed(path, value))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("text_config", None, "text_config: missing"),
        ("text_config.attention_bias", True, "text_config.attention_bias: biases of attention are not supported"),
        ("text_config.hidden_act", "gelu", "text_config.hidden_act: is 'gelu'"),
        ("text_config.num_key_value_heads", 5, "text_config.num_key_value_heads: 5 does not divide 32 heads"),
        ("text_config.head_dim", 96, "text_config.rope_scaling.mrope_section: [24, 20, 20] do not sum to "),
        ("text_config.rope_scaling.mrope_interleaved", None, "text_config.rope_scaling.mrope_interleaved: must be "),
        ("text_config.rope_scaling.mrope_interleaved", False, "text_config.rope_scaling.mrope_interleaved: must be "),
        ("text_config.rope_scaling.mrope_section", [16, 24, 24], "text_config.rope_scaling.mrope_section: is [16, "),
        ("text_config.rope_scaling.rope_type", "yarn", "text_config.rope_scaling.rope_type: is 'yarn'; only M-RoPE "),
        ("vision_config.hidden_act", "silu", "vision_config.hidden_act: is 'silu'"),
        ("vision_config.num_heads", 15, "vision_config.num_heads: hidden_size 1024 does not divide by 15 heads"),
        ("vision_config.num_heads", 512, "vision_config.num_heads: a head of 2 does not divide by 4"),
        ("vision_config.num_position_embeddings", 2300, "vision_config.num_position_embeddings: 2300 is not a square"),
        ("vision_config.out_hidden_size", 2048, "vision_config.out_hidden_size: is not the language model's width"),
        ("vision_config.deepstack_visual_indexes", 5, "vision_config.deepstack_visual_indexes: is 5, not list"),
        ("vision_config.deepstack_visual_indexes", [5, 24], "vision_config.deepstack_visual_indexes: layer 24 of a "),
        ("vision_config.deepstack_visual_indexes", [11, 5], "vision_config.deepstack_visual_indexes: [11, 5] do not "),
        ("vision_config.deepstack_visual_indexes", [5, 5], "vision_config.deepstack_visual_indexes: [5, 5] do not "),
        ("text_config.num_hidden_layers", 2, "vision_config.deepstack_visual_indexes: 3 levels for the 2 layers of "),
        (
            "vision_config.deepstack_visual_indexes",
            None,
            "vision_config.deepstack_visual_indexes: layer 24 of a tower of 24 layers, which count from 0; the key is ",
        ),
    ],
)
def test_faults_of_interleaved_rotary_deepstack_and_learned_positions(path, value, message):
    with pytest.raises(ValueError) as caught:
        ModelShape.from_dict(changed(path, value, published_config("Qwen3-VL-4B")))
    assert str(caught.value).startswith(f"config.json: {message}")


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"config.json: no such file"):
        ModelShape.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json: not JSON"):
        ModelShape.from_folder(tmp_path)


def test_ids_beyond_a_small_vocabulary_are_not_banned():
    assert ModelShape.from_dict(changed("vocab_size", 151654)).vision_token_ids == (151652, 151653)


def test_widths_are_padded_alike_for_every_common_tensor_parallelism():
    assert {padded(3420, tensor) for tensor in (1, 2, 4, 8, 16)} == {3424}
    assert padded(3420, 3) == 3456
    assert padded(151936, 8) == 151936


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], (36,)),
        (["parallel.pipeline=5"], (7, 7, 7, 7, 8)),
        (["parallel.pipeline=3", "parallel.pipeline_layers=[10,12,14]"], (10, 12, 14)),
    ],
)
def test_layers_of_the_stages(overrides, expected):
    assert stage_layers(load_config(None, overrides).parallel, ModelShape.from_dict(PUBLISHED_3B)) == expected


@pytest.mark.parametrize(
    ("overrides", "world_size", "message"),
    [
        (["parallel.tensor=3"], None, "parallel.tensor: 16 attention heads do not divide by 3"),
        (["parallel.pipeline=37"], None, "parallel.pipeline: 37 stages for 36 layers"),
        (
            ["parallel.pipeline=2", "parallel.pipeline_layers=[1,2]"],
            None,
            "parallel.pipeline_layers: [1, 2] sum to 3, the model has 36 layers",
        ),
        (
            ["parallel.pipeline=2", "parallel.pipeline_layers=[30,7]", "model.path=folder"],
            None,
            "parallel.pipeline_layers: [30, 7] sum to 37, the model has 36 layers (folder/config.json)",
        ),
        (["parallel.tensor=2", "parallel.pipeline=2"], 6, "parallel.tensor: 6 ranks do not divide by"),
    ],
)
def test_impossible_layouts_name_the_key(overrides, world_size, message):
    with pytest.raises(ConfigError) as caught:
        check_layout(load_config(None, overrides), ModelShape.from_dict(PUBLISHED_3B), world_size)
    assert str(caught.value).startswith(message)


def test_key_value_heads_and_vision_heads_are_checked_too():
    few = ModelShape.from_dict(changed("num_key_value_heads", 4))
    check_layout(load_config(None, ["parallel.tensor=8"]), few, 8)  # 4 heads, each on two ranks
    odd = changed("vision_config.num_heads", 10)
    with pytest.raises(ConfigError, match="10 heads of the vision tower do not divide by 4"):
        check_layout(load_config(None, ["parallel.tensor=4"]), ModelShape.from_dict(odd))
    six = ModelShape.from_dict(
        changed("num_attention_heads", 24)
        | {
            "hidden_size": 3072,
            "num_key_value_heads": 6,
            "vision_config": {**PUBLISHED_3B["vision_config"], "out_hidden_size": 3072},
        }
    )
    with pytest.raises(ConfigError, match="6 key-value heads and 4 ranks do not divide"):
        check_layout(load_config(None, ["parallel.tensor=4"]), six)


def test_reading_a_shape_imports_no_torch():
    code = "import sys, megatron_papo.model.shape; sys.exit('torch' in sys.modules)"
    assert subprocess.run([PYTHON, "-c", code], check=False).returncode == 0
