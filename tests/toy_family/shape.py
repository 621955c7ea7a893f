"""Reads the toy family's config.json."""

from __future__ import annotations

from megatron_papo.files.json_keys import Keys
from megatron_papo.model.shape import LanguageShape, ModelShape, VisionShape

PROCESSOR = "Qwen2_5_VLProcessor"


def read_shape(root: Keys) -> ModelShape:
    """The shape that the parsed config.json `root` describes."""
    return ModelShape(
        model_type=root.get("model_type", str),
        language=_language(root.section("language")),
        vision=_vision(root.section("tower")),
        tie_word_embeddings=root.flag("tie_word_embeddings"),
        image_token_id=root.index("image_token_id", 0),
        video_token_id=root.index("video_token_id", 0),
        vision_start_token_id=root.index("vision_start_token_id", 0),
        vision_end_token_id=root.index("vision_end_token_id", 0),
    )


def _language(keys: Keys) -> LanguageShape:
    time, height, width = keys.counts("sections", [])
    return LanguageShape(
        num_layers=keys.count("layers"),
        hidden_size=keys.count("width"),
        intermediate_size=keys.count("inner"),
        num_heads=keys.count("heads"),
        num_kv_heads=keys.count("kv_heads"),
        head_dim=keys.count("head_dim"),
        vocab_size=keys.count("vocabulary"),
        norm_eps=1e-5,
        rope_theta=keys.positive("theta", 1e4),
        mrope_section=(time, height, width),
        initializer_range=0.02,
        norm="layer",
        mlp="gelu",
        qkv_bias=True,
        linear_bias=True,
        qk_norm=True,
        interleaved_mrope=True,
    )


def _vision(keys: Keys) -> VisionShape:
    return VisionShape(
        num_layers=keys.count("layers"),
        hidden_size=keys.count("width"),
        intermediate_size=keys.count("inner"),
        num_heads=keys.count("heads"),
        out_hidden_size=keys.count("out"),
        in_channels=3,
        patch_size=8,
        temporal_patch_size=1,
        spatial_merge_size=2,
        norm_eps=1e-5,
        norm="layer",
        mlp="gelu_tanh",
    )
