"""The tests' tiny models of each family as a Hugging Face folder: weights, config, tokenizer, processor, chat template.

The tokenizer is byte-level without merges, so any text makes the round trip, one token a byte. Weights are drawn wide
and biases and norm weights at random too: at the usual 0.02 a wrong position or a swapped tensor hardly shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from examples.quickstart.model_folder import byte_tokenizer, model_config, new_model, write_folder

NUM_BYTES = 256
"""The ids below this are bytes; the seven special tokens follow."""
PIXELS = {"qwen2_5_vl": (28 * 28, 112 * 112), "qwen3_vl": (32 * 32, 128 * 128)}
"""The fewest and the most pixels of a picture: one to sixteen image tokens."""


def tiny_config(
    family: str = "qwen2_5_vl",
    *,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    vision_depth: int = 2,
    vision_hidden: int = 32,
    vision_heads: int = 2,
    vision_intermediate: int = 48,
    deepstack: Sequence[int] | None = None,
    tie: bool = False,
    vocab: int = 272,
) -> PreTrainedConfig:
    """The shape. Ids from 263 to `vocab` are padding that no tokenizer writes. vLLM's CPU kernels need heads of 32
    dimensions or more.

    Of Qwen2.5-VL the last vision layer attends in full, the others in windows of 2 x 2 merged patches. Of Qwen3-VL the
    vision layers `deepstack` are tapped (None: as many of the first as the language model has layers, three at most),
    and learned positions are interpolated from a grid of 6 x 6.
    """
    vision: dict[str, object] = {
        "depth": vision_depth,
        "hidden_size": vision_hidden,
        "intermediate_size": vision_intermediate,
        "num_heads": vision_heads,
    }
    if family == "qwen3_vl":
        taps = range(min(vision_depth, layers, 3)) if deepstack is None else deepstack
        vision |= {"num_position_embeddings": 36, "deepstack_visual_indexes": list(taps)}
    else:
        vision |= {"window_size": 56, "fullatt_block_indexes": [vision_depth - 1]}
    return model_config(
        family,
        first_special=NUM_BYTES,
        vocab=vocab,
        hidden=hidden,
        intermediate=2 * hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        max_positions=2048,
        vision=vision,
        tie=tie,
    )


def tiny_model(config: PreTrainedConfig, *, seed: int = 0, std: float = 0.15) -> PreTrainedModel:
    """An fp32 model with matrices and biases of standard deviation `std`, norm weights around one."""
    return wide_weights(new_model(config).eval(), seed=seed, std=std)


def wide_weights[Model: torch.nn.Module](model: Model, *, seed: int = 0, std: float = 0.15) -> Model:
    """The model with weights drawn anew, as wide as `tiny_model` says."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, std, generator=generator)
            if parameter.dim() == 1 and name.endswith("weight"):
                parameter.add_(1.0)
    return model


def make_tiny_folder(
    path: Path,
    *,
    family: str = "qwen2_5_vl",
    seed: int = 0,
    std: float = 0.15,
    max_shard_size: str = "5GB",
    **shape: Any,
) -> Path:
    """Writes everything a folder of `family` holds to `path` and returns it.

    `shape` goes to `tiny_config`, `seed` and `std` to `tiny_model`; `max_shard_size` splits the safetensors.
    """
    model = tiny_model(tiny_config(family, **shape), seed=seed, std=std)
    least, most = PIXELS[family]
    return write_folder(path, model, byte_tokenizer(), min_pixels=least, max_pixels=most, max_shard_size=max_shard_size)
