"""The tests' tiny Qwen2.5-VL as a Hugging Face folder: weights, config, tokenizer, processor, chat template.

The tokenizer is byte-level without merges, so any text makes the round trip, one token a byte. Weights are drawn wide
and biases and norm weights at random too: at the usual 0.02 a wrong position or a swapped tensor hardly shows.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from examples.quickstart.model_folder import byte_tokenizer, model_config, write_folder

NUM_BYTES = 256
"""The ids below this are bytes; the seven special tokens follow."""


def tiny_config(
    *,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    vision_depth: int = 2,
    vision_hidden: int = 32,
    vision_heads: int = 2,
    vision_intermediate: int = 48,
    tie: bool = False,
    vocab: int = 272,
) -> Qwen2_5_VLConfig:
    """The shape; the last vision layer attends in full, the others in windows of 2 x 2 merged patches.

    Ids from 263 to `vocab` are padding that no tokenizer writes. vLLM's CPU kernels need `hidden / heads` >= 32.
    """
    return model_config(
        first_special=NUM_BYTES,
        vocab=vocab,
        hidden=hidden,
        intermediate=2 * hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        max_positions=2048,
        vision={
            "depth": vision_depth,
            "hidden_size": vision_hidden,
            "intermediate_size": vision_intermediate,
            "num_heads": vision_heads,
            "window_size": 56,
            "fullatt_block_indexes": [vision_depth - 1],
        },
        tie=tie,
    )


def tiny_model(config: Qwen2_5_VLConfig, *, seed: int = 0, std: float = 0.15) -> Qwen2_5_VLForConditionalGeneration:
    """An fp32 model with matrices and biases of standard deviation `std`, norm weights around one."""
    return wide_weights(Qwen2_5_VLForConditionalGeneration(config).float().eval(), seed=seed, std=std)


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
    path: Path, *, seed: int = 0, std: float = 0.15, max_shard_size: str = "5GB", **shape: int | bool
) -> Path:
    """Writes everything a Qwen2.5-VL folder holds to `path` and returns it.

    `shape` goes to `tiny_config`, `seed` and `std` to `tiny_model`; `max_shard_size` splits the safetensors.
    """
    model = tiny_model(tiny_config(**shape), seed=seed, std=std)
    return write_folder(
        path, model, byte_tokenizer(), min_pixels=28 * 28, max_pixels=112 * 112, max_shard_size=max_shard_size
    )
