"""The shapes of the published Qwen2.5-VL models, as their config.json has them; no weights."""

from __future__ import annotations

from typing import Any

_LANGUAGE = {  # layers, width, FFN, heads, key-value heads, vocabulary, tied
    "3B": (36, 2048, 11008, 16, 2, 151936, True),
    "7B": (28, 3584, 18944, 28, 4, 152064, False),
    "32B": (64, 5120, 27648, 40, 8, 152064, False),
    "72B": (80, 8192, 29568, 64, 8, 152064, False),
}
_VISION_FFN = {"3B": 3420, "7B": 3420, "32B": 3456, "72B": 3456}
NUM_PARAMETERS = {"3B": 3_754_622_976, "7B": 8_292_166_656, "32B": 33_452_718_336, "72B": 73_410_777_344}


def published_config(size: str) -> dict[str, Any]:
    """The tree of config.json for "3B", "7B", "32B" or "72B"."""
    layers, hidden, ffn, heads, kv_heads, vocab, tied = _LANGUAGE[size]
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "max_position_embeddings": 128000,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "torch_dtype": "bfloat16",
        "vision_config": {
            "depth": 32,
            "hidden_act": "silu",
            "hidden_size": 1280,
            "intermediate_size": _VISION_FFN[size],
            "num_heads": 16,
            "in_chans": 3,
            "out_hidden_size": hidden,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
    }
