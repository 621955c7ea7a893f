"""The model that the benchmarks run: a Qwen2.5-VL folder of five million random weights, with its own tokenizer.

A tenth of the 3B model's width and a ninth of its depth, in the same proportions: as many layers in the vision tower
as in the language model, grouped queries, about as much arithmetic on an image token's four patches as on the token.
Weights have transformers' own standard deviation of 0.02. The tokenizer's 2,048 words are all sayable: the bytes,
pairs of letters, and the special tokens.
"""

from __future__ import annotations

from itertools import islice, product
from pathlib import Path
from string import ascii_letters

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
NUM_WORDS = 2048
NUM_PLAIN_WORDS = NUM_WORDS - len(SPECIAL)
"""Ids below this are bytes and pairs of letters."""
HIDDEN, LAYERS, VISION_HIDDEN, VISION_LAYERS, HEAD_DIM = 192, 4, 128, 4, 32
MIN_PIXELS, MAX_PIXELS = 28 * 28, 2048 * 28 * 28
"""So wide that no picture of the benchmarks is resized."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_model(folder: Path, seed: int = 0, hidden: int = HIDDEN, layers: int = LAYERS) -> Path:
    """Writes weights, configuration, tokenizer and processor to `folder` and returns it.

    `hidden` and `layers` of the language model, for a larger one.
    """
    tokenizer = _tokenizer()
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(_config(hidden, layers)).float()
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True
    )
    model.save_pretrained(folder)
    pixels = {"min_pixels": MIN_PIXELS, "max_pixels": MAX_PIXELS}
    Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**pixels),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**pixels),
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = list(islice(product(ascii_letters, repeat=2), NUM_PLAIN_WORDS - len(letters)))
    words = [*letters, *(first + second for first, second in pairs)]
    backend = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL),
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=8192,
    )


def _config(hidden: int, layers: int) -> Qwen2_5_VLConfig:
    ids = {name: NUM_PLAIN_WORDS + index for index, name in enumerate(SPECIAL)}
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": NUM_WORDS,
            "hidden_size": hidden,
            "intermediate_size": 1024 * hidden // HIDDEN,
            "num_hidden_layers": layers,
            "num_attention_heads": hidden // HEAD_DIM,
            "num_key_value_heads": 2,
            "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]},
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": VISION_LAYERS,
            "hidden_size": VISION_HIDDEN,
            "intermediate_size": 344,
            "num_heads": VISION_HIDDEN // HEAD_DIM,
            "out_hidden_size": hidden,
            "fullatt_block_indexes": [VISION_LAYERS - 1],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
        dtype="float32",
    )
