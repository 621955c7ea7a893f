"""What several settings say together, in one place: the folder of the model, and what an engine keeps its weights in.

Imports no torch: the command line asks before any rank starts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from megatron_papo.config import Config, ConfigError


def model_folder_or_none(config: Config) -> Path | None:
    """Where config.json, tokenizer and processor lie: the Hugging Face folder, else the Megatron checkpoint."""
    return config.model.path or config.model.checkpoint


def model_folder(config: Config) -> Path:
    """`model_folder_or_none`; raises ConfigError where the settings name no model."""
    folder = model_folder_or_none(config)
    if folder is None:
        raise ConfigError("model.path: names no folder")
    return folder


def weights_folder(config: Config) -> Path:
    """Where the weights come from: the Megatron checkpoint, else the Hugging Face folder."""
    return config.model.checkpoint or model_folder(config)


def engine_dtype(config: Config) -> Literal["auto", "float32", "bfloat16"]:
    """The type of the engine's weights; `auto` is bfloat16 on a GPU and float32 without one."""
    return config.model.dtype if config.generation.dtype == "auto" else config.generation.dtype


def engine_weight_bytes(config: Config) -> int:
    """Bytes of one weight in the engine, on a GPU."""
    if config.generation.quantization == "fp8":
        return 1
    return 4 if engine_dtype(config) == "float32" else 2
