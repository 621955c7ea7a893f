"""The shapes of the published Qwen2.5-VL models by name, from their config.json; a folder gives its own.

Source: config.json of Qwen/Qwen2.5-VL-{3B,7B,32B,72B}-Instruct on the Hugging Face hub. 3B's tower has an FFN of 3,420,
as 7B's; 32B's and 72B's of 3,456.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_papo.config import ConfigError
from megatron_papo.model.shape import ModelShape

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
NAMES = tuple(_LANGUAGE)


def shape_named(name: str) -> ModelShape:
    """Of a published model, with or without `-Instruct`, or of a Hugging Face folder. Raises ConfigError else."""
    known = name.removesuffix("-Instruct")
    if known in _LANGUAGE:
        return ModelShape.from_dict(published_config(known), source=name)
    if (Path(name) / "config.json").is_file():
        return ModelShape.from_folder(name)
    raise ConfigError(f"--model: {name} is none of {', '.join(NAMES)}, and no folder with a config.json")


def published_config(name: str) -> dict[str, Any]:
    """The published config.json without what no one reads."""
    language = _LANGUAGE[name]
    tree = {"model_type": "qwen2_5_vl", "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6, **language}
    tree["rope_scaling"] = {"type": "mrope", "mrope_section": [16, 24, 24]}
    tree["vision_config"] = {
        "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": _TOWER_FFN[name], "num_heads": 16,
        "in_chans": 3, "out_hidden_size": language["hidden_size"], "patch_size": 14, "spatial_merge_size": 2,
        "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "temporal_patch_size": 2,
    }  # fmt: skip
    return tree
