"""The model that the benchmarks run: a folder of five million random weights of either family, with its own tokenizer.

A tenth of Qwen2.5-VL-3B's width and a ninth of its depth, in the same proportions: as many layers in the vision tower
as in the language model, grouped queries, about as much arithmetic on an image token's four patches as on the token.
Weights have transformers' own standard deviation of 0.02. The model may write any of the tokenizer's 2,048 words: the
bytes, pairs of letters, and the special tokens. Qwen3-VL has the same widths and depths, so that it differs by what its
family is: three levels of DeepStack, norms of queries and keys, a plain MLP and full attention in the tower, patches of
16 pixels; its plain MLP has half as many columns again, which makes as many weights as the gated one's three matrices.
"""

from __future__ import annotations

from itertools import islice, product
from pathlib import Path
from string import ascii_letters

import torch

from examples.quickstart.model_folder import SPECIAL, byte_tokenizer, model_config, new_model, write_folder

NUM_WORDS, NUM_BYTES, MAX_LENGTH = 2048, 256, 8192
NUM_PLAIN_WORDS = NUM_WORDS - len(SPECIAL)
"""Ids below this are bytes and pairs of letters."""
HIDDEN, LAYERS, VISION_HIDDEN, VISION_LAYERS, HEAD_DIM = 192, 4, 128, 4, 32
MIN_PIXELS, MAX_PIXELS = 28 * 28, 2048 * 32 * 32
"""The range is so wide that no picture of the benchmarks is resized."""
TOWERS = {
    "qwen2_5_vl": {"intermediate_size": 344, "fullatt_block_indexes": [VISION_LAYERS - 1]},
    "qwen3_vl": {"intermediate_size": 516, "deepstack_visual_indexes": [0, 1, 2], "num_position_embeddings": 48**2},
}
"""What is particular to the vision tower of each family."""


def write_model(
    folder: Path, seed: int = 0, hidden: int = HIDDEN, layers: int = LAYERS, family: str = "qwen2_5_vl"
) -> Path:
    """Writes weights, configuration, tokenizer and processor to `folder` and returns it.

    `hidden` is the width of the language model and `layers` its depth, for a larger one.
    """
    pairs = list(islice(product(ascii_letters, repeat=2), NUM_PLAIN_WORDS - NUM_BYTES))
    tokenizer = byte_tokenizer((first + second for first, second in pairs), pairs, max_length=MAX_LENGTH)
    torch.manual_seed(seed)
    config = model_config(
        family,
        first_special=NUM_PLAIN_WORDS,
        vocab=NUM_WORDS,
        hidden=hidden,
        intermediate=1024 * hidden // HIDDEN,
        layers=layers,
        heads=hidden // HEAD_DIM,
        kv_heads=2,
        max_positions=MAX_LENGTH,
        vision={
            "depth": VISION_LAYERS,
            "hidden_size": VISION_HIDDEN,
            "num_heads": VISION_HIDDEN // HEAD_DIM,
            **TOWERS[family],
        },
        tie=False,
    )
    return write_folder(folder, new_model(config), tokenizer, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)
