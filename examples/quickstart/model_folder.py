"""Writes small folders of Qwen2.5-VL and Qwen3-VL as Hugging Face has them: the one place where they are made.

The quickstart, the tests (tests/support/tiny.py), the benchmarks (benchmarks/models.py) and the sweeps on a CPU each
say which sizes, which words and which weights they want; what all such folders share stands here: the special tokens,
the chat template, the keys of config.json, the processor. It lies in the quickstart's own folder, so that the
quickstart needs nothing else of the repository, and is used from elsewhere as `examples.quickstart.model_folder`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
PADDING, END_OF_TURN = SPECIAL[0], SPECIAL[2]

# Qwen's turns; a user turn may be a string or a list of text and image parts.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(
    words: Iterable[str] = (),
    merges: Sequence[tuple[str, str]] = (),
    *,
    special: Sequence[str] = SPECIAL,
    max_length: int = 2048,
) -> PreTrainedTokenizerFast:
    """A tokenizer of 256 bytes, then `words`, then `special`: any text makes the round trip.

    `merges` are the pairs of words that are joined to a longer word; without any, a token is one byte. `max_length`
    is in tokens.
    """
    vocabulary = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *words]
    backend = Tokenizer(models.BPE({word: index for index, word in enumerate(vocabulary)}, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    return wrap_tokenizer(backend, max_length, additional_special_tokens=list(special))


def wrap_tokenizer(backend: Tokenizer, max_length: int, **more: object) -> PreTrainedTokenizerFast:
    """A tokenizer for transformers, which ends turns and pads as Qwen's does; `more` goes to its constructor."""
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END_OF_TURN,
        pad_token=PADDING,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
        **more,
    )


def model_config(
    family: str = "qwen2_5_vl",
    *,
    first_special: int,
    vocab: int,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    max_positions: int,
    vision: dict[str, object],
    tie: bool,
    head_dim: int | None = None,
) -> PreTrainedConfig:
    """config.json of a model whose `SPECIAL` tokens have ids from `first_special` on.

    `family`: `qwen2_5_vl` or `qwen3_vl`. Sizes are those of the language model; `head_dim` is for Qwen3-VL alone, and
    the hidden size over the heads where it is None. `vision` holds the keys of `vision_config` but `out_hidden_size`.
    `tie`: the head shares the embedding's weights. vLLM's CPU kernels need heads of 32 dimensions or more.
    """
    ids = {name: first_special + index for index, name in enumerate(SPECIAL)}
    half = (head_dim or hidden // heads) // 2
    text: dict[str, object] = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": max_positions,
        "bos_token_id": None,
        "eos_token_id": ids[END_OF_TURN],
        "pad_token_id": ids[PADDING],
        "tie_word_embeddings": tie,
    }
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": 10_000.0}
    if family == "qwen3_vl":
        # height and width have 20 of 64 frequencies each, time the rest, as in the published models
        share = 20 * half // 64
        rope |= {"mrope_section": [half - 2 * share, share, share], "mrope_interleaved": True}
        text["head_dim"] = head_dim or hidden // heads
    else:
        rope["mrope_section"] = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]
    config_class = {"qwen2_5_vl": Qwen2_5_VLConfig, "qwen3_vl": Qwen3VLConfig}[family]
    return config_class(
        text_config={**text, "rope_parameters": rope},
        vision_config={**vision, "out_hidden_size": hidden},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tie,
        dtype="float32",
    )


def new_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of this config.json with random weights in fp32, of transformers' class of its family."""
    return AutoModelForImageTextToText.from_config(config).float()


def write_folder(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    min_pixels: int,
    max_pixels: int,
    max_shard_size: str = "5GB",
    **patches: int,
) -> Path:
    """Writes weights, config, tokenizer, processor and generation config to `folder` and returns it.

    Pictures are resized to between `min_pixels` and `max_pixels`; weights are split into files of `max_shard_size`;
    `patches` as for `write_processor`.
    """
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True
    )
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    family = model.config.model_type
    write_processor(folder, tokenizer, family=family, min_pixels=min_pixels, max_pixels=max_pixels, **patches)
    return Path(folder)


def write_processor(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    *,
    min_pixels: int,
    max_pixels: int,
    family: str = "qwen2_5_vl",
    **patches: int,
) -> None:
    """Writes the tokenizer, the processor of pictures and the chat template to `folder`.

    `family`: Qwen3-VL has patches of 16 pixels and a mean and deviation of 0.5; any other is processed as Qwen2.5-VL.
    `patches`: `patch_size` and `temporal_patch_size`, where they are not the family's 14 or 16 pixels and 2 frames.
    """
    pixels: dict[str, object] = {"min_pixels": min_pixels, "max_pixels": max_pixels, **patches}
    processor_class, video_class = Qwen2_5_VLProcessor, Qwen2VLVideoProcessor
    if family == "qwen3_vl":
        pixels = {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, **pixels}
        processor_class, video_class = Qwen3VLProcessor, Qwen3VLVideoProcessor
    processor_class(
        image_processor=Qwen2VLImageProcessor(**pixels),
        tokenizer=tokenizer,
        video_processor=video_class(**pixels),
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
