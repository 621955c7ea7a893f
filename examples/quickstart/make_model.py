"""A tiny Qwen2.5-VL or Qwen3-VL with random weights, as the Hugging Face folder that any of its family has.

About one million parameters: a language model of 3 layers x 128 and a vision tower of 2 layers x 96 (Qwen2.5-VL) or
3 layers x 64 (Qwen3-VL), with the real architecture and a vocabulary of the few words that the quickstart's questions
and answers are made of. Of Qwen2.5-VL that is windowed and full vision attention, patch merger, M-RoPE and grouped
queries; of Qwen3-VL learned positions interpolated to the picture's grid, a DeepStack level for each language layer,
interleaved M-RoPE and norms of queries and keys. transformers, vLLM and `papo` all load it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_papo.runtime.needed_packages import check_packages

check_packages()

import torch
from families import DEFAULT, FAMILIES
from model_folder import SPECIAL, model_config, new_model, wrap_tokenizer, write_folder
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

WORDS = [
    "<unk>", "user", "assistant", "how", "many", "s", "?", "largest", "digit", "which", "is", "top", "bottom", "left",
    "right", "sum", "of", "the", "row", "<think>", "</think>", "so", "none", "+", "a", "guess", "\\boxed{", "}",
]  # fmt: skip
NUMBERS = [str(number) for number in range(19)]  # two digits add up to 18 at most


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


def make_model(folder: Path, seed: int = 0, family: str = DEFAULT) -> Path:
    """Writes weights, config, tokenizer, processor and generation config; returns `folder`.

    `family` is a key of `FAMILIES`. Pictures of fewer than 2 x 2 or more than 4 x 4 image tokens are resized. Heads of
    32 dimensions are the narrowest that vLLM's kernels take; 2 key-value heads suit 2 ranks.
    """
    logging.disable_progress_bar()
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    edge = FAMILIES[family].token_edge
    config = model_config(
        family, first_special=0, vocab=len(tokenizer), hidden=128, intermediate=256, layers=3, heads=4, kv_heads=2,
        max_positions=512, vision=FAMILIES[family].vision, tie=True,
    )  # fmt: skip
    model = new_model(config)
    return write_folder(folder, model, tokenizer, min_pixels=(2 * edge) ** 2, max_pixels=(4 * edge) ** 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--family", choices=list(FAMILIES), default=DEFAULT)
    arguments = parser.parse_args()
    print(make_model(arguments.folder, arguments.seed, arguments.family))


if __name__ == "__main__":
    main()
