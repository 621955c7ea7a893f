"""The published Qwen2.5-VL models: their config.json by name, and how many parameters they have.

Source: config.json of Qwen/Qwen2.5-VL-{3B,7B,32B,72B}-Instruct on the Hugging Face hub. The
vision towers of 3B and 7B have an FFN of width 3,420, those of 32B and 72B of 3,456. Leaves out keys that only
generation in transformers reads.
"""

from __future__ import annotations

from typing import Any

_LANGUAGE: dict[str, dict[str, Any]] = {
    "Qwen2.5-VL-3B": {
        "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
        "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "Qwen2.5-VL-7B": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
    },
    "Qwen2.5-VL-32B": {
        "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 40,
        "num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False,
    },
    "Qwen2.5-VL-72B": {
        "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False,
    },
}  # fmt: skip
_TOWER_FFN = {"Qwen2.5-VL-3B": 3420, "Qwen2.5-VL-7B": 3420, "Qwen2.5-VL-32B": 3456, "Qwen2.5-VL-72B": 3456}
HUB_NAME = "Qwen/{name}-Instruct"
"""Where the hub has the model of a published name."""
NUM_PARAMETERS = {
    "Qwen2.5-VL-3B": 3_754_622_976,
    "Qwen2.5-VL-7B": 8_292_166_656,
    "Qwen2.5-VL-32B": 33_452_718_336,
    "Qwen2.5-VL-72B": 73_410_777_344,
}
"""Number of parameters by published name, from the smallest model to the largest; a tied matrix counts once."""


def published_config(name: str) -> dict[str, Any]:
    """The tree of config.json of the model with this published name. Raises KeyError for any other name."""
    language = _LANGUAGE[name]
    tree = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "hidden_act": "silu",
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 128000, "torch_dtype": "bfloat16",
        "image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652,
        "vision_end_token_id": 151653, **language,
    }  # fmt: skip
    tree["rope_scaling"] = {"type": "mrope", "mrope_section": [16, 24, 24]}
    tree["vision_config"] = {
        "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": _TOWER_FFN[name], "num_heads": 16,
        "in_chans": 3, "out_hidden_size": language["hidden_size"], "patch_size": 14, "spatial_merge_size": 2,
        "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "temporal_patch_size": 2,
    }  # fmt: skip
    return tree
