"""A model of the toy family as a Hugging Face folder: weights, config, tokenizer, processor, chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from examples.quickstart.model_folder import byte_tokenizer, write_folder
from tests.support.tiny import wide_weights
from tests.toy_family.reference import Toy, toy_config


def make_toy_folder(path: Path, *, std: float = 0.15, **sizes: Any) -> Path:
    """Writes the folder to `path` and returns it. `sizes` go to `toy_config`; weights are drawn as wide as `std`."""
    model = wide_weights(Toy(toy_config(**sizes)).eval(), std=std)
    return write_folder(
        path, model, byte_tokenizer(), min_pixels=16 * 16, max_pixels=112 * 112, patch_size=8, temporal_patch_size=1
    )
