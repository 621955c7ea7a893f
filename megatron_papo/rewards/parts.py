"""The parts of a reward apart from mathematical equality: format, ANLS, repetition, length."""

from __future__ import annotations

import re

from megatron_papo.config import OverlongConfig
from megatron_papo.rewards.answers import last_box

_SPACES_AT_TAGS = re.compile(r"\s*(<|>|/)\s*")


def format_reward(response: str) -> float:
    """1 for a response that begins with a `<think>…</think>` block and puts an answer in a box after it, else 0."""
    response = response.strip()
    end = response.find("</think>")
    return float(response.startswith("<think>") and end >= 0 and bool(last_box(response[end:])))


def without_spaces_at_tags(response: str) -> str:
    """As the paper's code reads a response before it looks for an answer: no spaces around `<`, `>` and `/`."""
    return _SPACES_AT_TAGS.sub(r"\1", response)


def anls(answer: str, gold: str, threshold: float = 0.5) -> float:
    """Average normalised Levenshtein similarity of one pair, without case; 0 below `threshold` (Biten et al. 2019)."""
    from nltk.metrics.distance import edit_distance  # slow to import

    answer, gold = " ".join(answer.casefold().split()), " ".join(gold.casefold().split())
    if not answer or not gold:
        return 0.0
    longest = max(len(answer), len(gold))
    if abs(len(answer) - len(gold)) > (1 - threshold) * longest:
        return 0.0  # already too far, and a long gold answer would cost time
    similarity = 1 - edit_distance(answer, gold) / longest
    return similarity if similarity >= threshold else 0.0


def repetition(response: str, ngram: int) -> float:
    """Share of the response's n-grams of words that occurred before; 0 for a response shorter than one."""
    from nltk.tokenize import wordpunct_tokenize
    from nltk.util import ngrams

    grams = list(ngrams(wordpunct_tokenize(response), ngram))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def overlong(num_tokens: int, max_response_tokens: int, config: OverlongConfig) -> float:
    """DAPO's soft punishment: 0 until `buffer` tokens before the limit, then linear to -penalty at it (eq. 13)."""
    into_buffer = num_tokens - (max_response_tokens - config.buffer)
    return -config.penalty * min(max(into_buffer / config.buffer, 0.0), 1.0)
