"""A tiny Qwen2.5-VL with random weights, as the Hugging Face folder that any Qwen2.5-VL has.

About one million parameters: a language model of 3 layers x 128 and a vision tower of 2 layers x 96, with the real
architecture (windowed and full vision attention, patch merger, M-RoPE, grouped queries) and a vocabulary of the few
words that the quickstart's questions and answers are made of. transformers, vLLM and `papo` all load it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_papo.runtime.needed_packages import check_packages

check_packages()

import torch
from model_folder import SPECIAL, model_config, wrap_tokenizer, write_folder
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration
from transformers.utils import logging

WORDS = [
    "<unk>", "user", "assistant", "how", "many", "s", "?", "largest", "digit", "which", "is", "top", "bottom", "left",
    "right", "sum", "of", "the", "row", "<think>", "</think>", "so", "none", "+", "a", "guess", "\\boxed{", "}",
]  # fmt: skip
NUMBERS = [str(number) for number in range(19)]  # two digits add up to 18 at most
VISION = {
    "depth": 2,
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_heads": 4,
    "window_size": 112,
    "fullatt_block_indexes": [1],
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token a word, a number or a mark."""
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *WORDS, *NUMBERS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    pattern = Regex(r"</?think>|\\boxed\{|[0-9]+|[A-Za-z]+|[^\s]")
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(pattern, behavior="isolated")]
    )
    words.add_special_tokens(list(SPECIAL))
    return wrap_tokenizer(words, 512, unk_token="<unk>")


def make_model(folder: Path, seed: int = 0) -> Path:
    """Writes weights, config, tokenizer, processor and generation config; returns `folder`.

    Heads of 32 dimensions are the narrowest that vLLM's kernels take; 2 key-value heads suit 2 ranks.
    """
    logging.disable_progress_bar()
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    config = model_config(
        first_special=0, vocab=len(tokenizer), hidden=128, intermediate=256, layers=3, heads=4, kv_heads=2,
        max_positions=512, vision=VISION, tie=True,
    )  # fmt: skip
    model = Qwen2_5_VLForConditionalGeneration(config).float()
    return write_folder(folder, model, tokenizer, min_pixels=56 * 56, max_pixels=112 * 112)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(make_model(arguments.folder, arguments.seed))


if __name__ == "__main__":
    main()
