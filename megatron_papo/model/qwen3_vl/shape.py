"""Reads the shape of a Qwen3-VL model (dense) from its Hugging Face `config.json`.

Reads both what transformers 5 writes and the published files. Imports no torch. Refuses what this package does not
implement: biases in the language model's attention, and rotary embeddings other than interleaved M-RoPE without
scaling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from megatron_papo.files.json_keys import Keys
from megatron_papo.model.config_keys import (
    check_key_value_heads,
    check_vision_heads,
    mrope_fields,
    rotary_keys,
    vision_rope_theta,
    vision_token_ids,
)
from megatron_papo.model.shape import MOST_LAYERS, LanguageShape, ModelShape, VisionShape

PROCESSOR = "Qwen3VLProcessor"
"""The class of transformers that model folders name as their processor."""
_VISION_NORM_EPS = 1e-6
"""The epsilon of the vision tower's norms, which transformers has in its code; config.json has no key for it."""


@dataclass(frozen=True, kw_only=True)
class InterpolatedVisionShape(VisionShape):
    """The shape of a vision tower that attends within whole frames, with learned position embeddings on a square grid,
    which are interpolated to the grid of each image, and 2-D rotary positions beside them."""

    rope_theta: float
    """Base of the rotary frequencies."""


def read_shape(root: Keys) -> ModelShape:
    """The shape that the parsed config.json `root` describes. Raises ValueError naming the key at fault."""
    text = root.section("text_config")
    language = _language(text)
    return ModelShape(
        model_type=root.get("model_type", str),
        language=language,
        vision=_vision(root.section("vision_config"), language),
        tie_word_embeddings=root.flag("tie_word_embeddings"),
        **vision_token_ids(root),
    )


def _language(keys: Keys) -> LanguageShape:
    keys.must_be("hidden_act", "silu")
    if keys.flag("attention_bias"):
        raise keys.fault("attention_bias", "biases of attention are not supported")
    num_heads, head_dim = keys.count("num_attention_heads", 32), keys.count("head_dim", 128)
    shape = LanguageShape(
        num_layers=keys.count("num_hidden_layers", 32, most=MOST_LAYERS),
        hidden_size=keys.count("hidden_size", 4096),
        intermediate_size=keys.count("intermediate_size", 22016),
        num_heads=num_heads,
        num_kv_heads=keys.count("num_key_value_heads", num_heads),
        head_dim=head_dim,
        vocab_size=keys.count("vocab_size", 151936),
        norm_eps=keys.positive("rms_norm_eps", 1e-6),
        initializer_range=keys.positive("initializer_range", 0.02),
        qk_norm=True,
        interleaved_mrope=True,
        **_rope(keys, head_dim),
    )
    check_key_value_heads(keys, num_heads, shape.num_kv_heads)
    return shape


def _rope(keys: Keys, head_dim: int) -> dict[str, Any]:
    """The fields rope_theta and mrope_section of interleaved M-RoPE."""
    fields, rope = mrope_fields(keys, head_dim, sections=[24, 20, 20], theta=5e5), rotary_keys(keys)
    if not rope.flag("mrope_interleaved"):
        # transformers interleaves whatever the key says, vLLM only where it is true
        raise rope.fault("mrope_interleaved", "must be true: other implementations would take runs of frequencies")
    section = fields["mrope_section"]
    if max(section[1:]) > section[0]:
        raise rope.fault("mrope_section", f"is {list(section)}: of interleaved frequencies time has the most")
    return fields


def _vision(keys: Keys, language: LanguageShape) -> InterpolatedVisionShape:
    keys.must_be("hidden_act", "gelu_pytorch_tanh")
    places = keys.count("num_position_embeddings", 2304)
    shape = InterpolatedVisionShape(
        num_layers=keys.count("depth", 27, most=MOST_LAYERS),
        hidden_size=keys.count("hidden_size", 1152),
        intermediate_size=keys.count("intermediate_size", 4304),
        num_heads=keys.count("num_heads", 16),
        out_hidden_size=keys.count("out_hidden_size", 3584),
        in_channels=keys.count("in_channels", 3),
        patch_size=keys.count("patch_size", 16),
        temporal_patch_size=keys.count("temporal_patch_size", 2),
        spatial_merge_size=keys.count("spatial_merge_size", 2),
        norm_eps=_VISION_NORM_EPS,
        norm="layer",
        mlp="gelu_tanh",
        deepstack_layers=keys.counts("deepstack_visual_indexes", [8, 16, 24]),
        position_edge=math.isqrt(places),
        rope_theta=vision_rope_theta(keys),
    )
    check_vision_heads(keys, shape.hidden_size, shape.num_heads)
    if shape.position_edge**2 != places:
        raise keys.fault("num_position_embeddings", f"{places} is not a square grid")
    _check_levels(keys, shape, language)
    return shape


def _check_levels(keys: Keys, shape: InterpolatedVisionShape, language: LanguageShape) -> None:
    """Raises ValueError where the levels of DeepStack do not fit the tower or the language model."""
    key, layers = "deepstack_visual_indexes", shape.deepstack_layers
    missing = "" if key in keys.tree else f"; the key is missing, which means {list(layers)}"
    if any(after <= before for before, after in pairwise(layers)):
        raise keys.fault(key, f"{list(layers)} do not rise")
    if layers and layers[-1] >= shape.num_layers:
        raise keys.fault(
            key, f"layer {layers[-1]} of a tower of {shape.num_layers} layers, which count from 0{missing}"
        )
    if len(layers) > language.num_layers:
        raise keys.fault(
            key, f"{len(layers)} levels for the {language.num_layers} layers of the language model{missing}"
        )
