"""Reads the shape of a Qwen2.5-VL model from its Hugging Face `config.json`.

Reads both the nested file that transformers 5 writes and the flat one of the published models. Imports no torch.
Refuses what this package does not implement: sliding-window attention and RoPE scaling other than M-RoPE.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_papo.files.json_keys import Keys
from megatron_papo.model.config_keys import (
    check_head_count,
    check_key_value_heads,
    check_vision_heads,
    mrope_fields,
    vision_rope_theta,
    vision_token_ids,
)
from megatron_papo.model.shape import MOST_LAYERS, LanguageShape, ModelShape, VisionShape

PROCESSOR = "Qwen2_5_VLProcessor"
"""The class of transformers that model folders name as their processor."""
_VISION_NORM_EPS = 1e-6
"""The epsilon of the vision tower's norms, which transformers has in its code; config.json has no key for it."""


@dataclass(frozen=True, kw_only=True)
class WindowedVisionShape(VisionShape):
    """The shape of a vision tower most of whose layers attend within windows, with 2-D rotary positions."""

    window_size: int
    """Edge of an attention window in pixels."""
    full_attention_layers: tuple[int, ...]
    """Layers (from 0) that attend over a whole image; the others attend within windows."""
    rope_theta: float
    """Base of the rotary frequencies."""


def read_shape(root: Keys) -> ModelShape:
    """The shape that the parsed config.json `root` describes. Raises ValueError naming the key at fault."""
    text = root.section("text_config") if "text_config" in root.tree else root
    vision = root.section("vision_config")
    return ModelShape(
        model_type=root.get("model_type", str),
        language=_language(text),
        vision=_vision(vision),
        tie_word_embeddings=root.flag("tie_word_embeddings") or text.flag("tie_word_embeddings"),
        **vision_token_ids(root),
    )


def _language(keys: Keys) -> LanguageShape:
    keys.must_be("hidden_act", "silu")
    if keys.flag("use_sliding_window"):
        raise keys.fault("use_sliding_window", "sliding-window attention is not supported")
    num_heads, hidden_size = keys.count("num_attention_heads"), keys.count("hidden_size")
    check_head_count(keys, "num_attention_heads", hidden_size, num_heads)
    head_dim = hidden_size // num_heads
    shape = LanguageShape(
        num_layers=keys.count("num_hidden_layers", most=MOST_LAYERS),
        hidden_size=hidden_size,
        intermediate_size=keys.count("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=keys.count("num_key_value_heads", num_heads),
        head_dim=head_dim,
        vocab_size=keys.count("vocab_size"),
        norm_eps=keys.positive("rms_norm_eps", 1e-5),
        initializer_range=keys.positive("initializer_range", 0.02),
        qkv_bias=True,
        **mrope_fields(keys, head_dim, sections=[16, 24, 24], theta=1e6),
    )
    check_key_value_heads(keys, num_heads, shape.num_kv_heads)
    return shape


def _vision(keys: Keys) -> WindowedVisionShape:
    keys.must_be("hidden_act", "silu")
    channels = "in_chans" if "in_chans" in keys.tree else "in_channels"
    shape = WindowedVisionShape(
        num_layers=keys.count("depth", most=MOST_LAYERS),
        hidden_size=keys.count("hidden_size"),
        intermediate_size=keys.count("intermediate_size"),
        num_heads=keys.count("num_heads"),
        out_hidden_size=keys.count("out_hidden_size"),
        in_channels=keys.count(channels, 3),
        patch_size=keys.count("patch_size", 14),
        temporal_patch_size=keys.count("temporal_patch_size", 2),
        spatial_merge_size=keys.count("spatial_merge_size", 2),
        norm_eps=_VISION_NORM_EPS,
        window_size=keys.count("window_size", 112),
        full_attention_layers=keys.counts("fullatt_block_indexes", [7, 15, 23, 31]),
        rope_theta=vision_rope_theta(keys),
    )
    check_vision_heads(keys, shape.hidden_size, shape.num_heads)
    if shape.window_size % (shape.patch_size * shape.spatial_merge_size):
        raise keys.fault("window_size", f"{shape.window_size} is no whole number of merged patches")
    return shape
