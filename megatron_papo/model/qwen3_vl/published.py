"""The published dense Qwen3-VL models: their config.json by name, and how many parameters they have.

Source: config.json of Qwen/Qwen3-VL-{2B,4B,8B,32B}-Instruct on the Hugging Face hub; those of the Thinking models have
the same shapes. The vision towers of 2B and 4B are one, those of 8B and 32B another, larger one; their image tokens
are as wide as the language model. Leaves out keys that only generation in transformers reads.
"""

from __future__ import annotations

from typing import Any

_LANGUAGE: dict[str, dict[str, Any]] = {
    "Qwen3-VL-2B": {
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "Qwen3-VL-4B": {
        "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
        "tie_word_embeddings": True,
    },
    "Qwen3-VL-8B": {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
    "Qwen3-VL-32B": {
        "hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64,
        "tie_word_embeddings": False,
    },
}  # fmt: skip
_SMALL_TOWER: dict[str, Any] = {
    "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17],
}  # fmt: skip
_LARGE_TOWER: dict[str, Any] = {
    "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24],
}  # fmt: skip
_TOWERS = {
    "Qwen3-VL-2B": _SMALL_TOWER, "Qwen3-VL-4B": _SMALL_TOWER, "Qwen3-VL-8B": _LARGE_TOWER, "Qwen3-VL-32B": _LARGE_TOWER,
}  # fmt: skip
HUB_NAME = "Qwen/{name}-Instruct"
"""Where the hub has the model of a published name."""
NUM_PARAMETERS = {
    "Qwen3-VL-2B": 2_127_532_032,
    "Qwen3-VL-4B": 4_437_815_808,
    "Qwen3-VL-8B": 8_767_123_696,
    "Qwen3-VL-32B": 33_357_390_064,
}
"""Number of parameters by published name, from the smallest model to the largest; a tied matrix counts once."""


def published_config(name: str) -> dict[str, Any]:
    """The tree of config.json of the model with this published name. Raises KeyError for any other name."""
    language = _LANGUAGE[name]
    text = {
        "model_type": "qwen3_vl_text", "attention_bias": False, "head_dim": 128, "hidden_act": "silu",
        "initializer_range": 0.02, "max_position_embeddings": 262144, "num_key_value_heads": 8, "rms_norm_eps": 1e-6,
        "rope_theta": 5e6, "vocab_size": 151936, "dtype": "bfloat16", **language,
    }  # fmt: skip
    text["rope_scaling"] = {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [24, 20, 20]}
    vision = {
        "model_type": "qwen3_vl", "hidden_act": "gelu_pytorch_tanh", "in_channels": 3, "num_heads": 16,
        "num_position_embeddings": 2304, "out_hidden_size": language["hidden_size"], "patch_size": 16,
        "spatial_merge_size": 2, "temporal_patch_size": 2, **_TOWERS[name],
    }  # fmt: skip
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl", "image_token_id": 151655,
        "video_token_id": 151656, "vision_start_token_id": 151652, "vision_end_token_id": 151653,
        "tie_word_embeddings": language["tie_word_embeddings"], "text_config": text, "vision_config": vision,
    }  # fmt: skip
