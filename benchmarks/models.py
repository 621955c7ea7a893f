"""The model that the benchmarks run: a Qwen2.5-VL folder of five million random weights, with its own tokenizer.

A tenth of the 3B model's width and a ninth of its depth, in the same proportions: as many layers in the vision tower
as in the language model, grouped queries, about as much arithmetic on an image token's four patches as on the token.
Weights have transformers' own standard deviation of 0.02. The model may write any of the tokenizer's 2,048 words: the
bytes, pairs of letters, and the special tokens.
"""

from __future__ import annotations

from itertools import islice, product
from pathlib import Path
from string import ascii_letters

import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from examples.quickstart.model_folder import SPECIAL, byte_tokenizer, model_config, write_folder

NUM_WORDS, NUM_BYTES, MAX_LENGTH = 2048, 256, 8192
NUM_PLAIN_WORDS = NUM_WORDS - len(SPECIAL)
"""Ids below this are bytes and pairs of letters."""
HIDDEN, LAYERS, VISION_HIDDEN, VISION_LAYERS, HEAD_DIM = 192, 4, 128, 4, 32
MIN_PIXELS, MAX_PIXELS = 28 * 28, 2048 * 28 * 28
"""The range is so wide that no picture of the benchmarks is resized."""


def write_model(folder: Path, seed: int = 0, hidden: int = HIDDEN, layers: int = LAYERS) -> Path:
    """Writes weights, configuration, tokenizer and processor to `folder` and returns it.

    `hidden` is the width of the language model and `layers` its depth, for a larger one.
    """
    pairs = list(islice(product(ascii_letters, repeat=2), NUM_PLAIN_WORDS - NUM_BYTES))
    tokenizer = byte_tokenizer((first + second for first, second in pairs), pairs, max_length=MAX_LENGTH)
    torch.manual_seed(seed)
    config = model_config(
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
            "intermediate_size": 344,
            "num_heads": VISION_HIDDEN // HEAD_DIM,
            "fullatt_block_indexes": [VISION_LAYERS - 1],
        },
        tie=False,
    )
    model = Qwen2_5_VLForConditionalGeneration(config).float()
    return write_folder(folder, model, tokenizer, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)
