"""A tiny Qwen2.5-VL as a Hugging Face folder, for tests: weights, config, tokenizer, processor, chat template.

The tokenizer is byte-level without merges, so any text makes the round trip, one token a byte. Weights are drawn wide
and biases and norm weights at random too: at the usual 0.02 a wrong position or a swapped tensor hardly shows.
"""

from __future__ import annotations

from pathlib import Path

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

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """256 bytes, then the special tokens: 263 ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
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
        model_max_length=2048,
    )


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
    half = hidden // heads // 2
    ids = {name: 256 + index for index, name in enumerate(SPECIAL)}
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocab,
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "max_position_embeddings": 2048,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8],
            },
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "tie_word_embeddings": tie,
        },
        vision_config={
            "depth": vision_depth,
            "hidden_size": vision_hidden,
            "intermediate_size": vision_intermediate,
            "num_heads": vision_heads,
            "out_hidden_size": hidden,
            "window_size": 56,
            "fullatt_block_indexes": [vision_depth - 1],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tie,
        dtype="float32",
    )


def tiny_model(config: Qwen2_5_VLConfig, *, seed: int = 0, std: float = 0.15) -> Qwen2_5_VLForConditionalGeneration:
    """fp32 model with matrices and biases of standard deviation `std`, norm weights around one."""
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
    path: Path,
    *,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    vision_depth: int = 2,
    tie: bool = False,
    vocab: int = 272,
    seed: int = 0,
    std: float = 0.15,
    vision_hidden: int = 32,
    vision_heads: int = 2,
    vision_intermediate: int = 48,
    max_shard_size: str = "5GB",
) -> Path:
    """Writes everything a Qwen2.5-VL folder holds to `path` and returns it; `max_shard_size` splits the safetensors."""
    config = tiny_config(
        hidden=hidden, layers=layers, heads=heads, kv_heads=kv_heads, vision_depth=vision_depth, tie=tie, vocab=vocab,
        vision_hidden=vision_hidden, vision_heads=vision_heads, vision_intermediate=vision_intermediate,
    )  # fmt: skip
    model = tiny_model(config, seed=seed, std=std)
    tokenizer = tiny_tokenizer()
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True
    )
    model.save_pretrained(path, max_shard_size=max_shard_size)
    pixels = {"min_pixels": 28 * 28, "max_pixels": 112 * 112}
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**pixels),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**pixels),
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(path)
    return Path(path)
