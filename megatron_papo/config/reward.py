"""The section `reward`: the parts of a rollout's reward and their weights."""

from __future__ import annotations

from typing import Literal

from megatron_papo.config.basics import Count, NonNegative, Positive, Section


class OverlongConfig(Section):
    """DAPO's soft overlong punishment: from 0 to -penalty over the last `buffer` tokens before the limit."""

    enabled: bool = False
    """Whether long answers are punished."""
    buffer: Count = 512
    """Number of tokens before generation.max_response_tokens over which the penalty grows."""
    penalty: NonNegative = 1.0
    """Penalty of a response that reaches generation.max_response_tokens."""


class RewardConfig(Section):
    accuracy_weight: NonNegative = 0.9
    """Weight of the accuracy: whether the answer in the box is right."""
    format_weight: NonNegative = 0.1
    """Weight of the format: a think block followed by a box."""
    accuracy: Literal["math", "mathruler", "exact", "anls"] = "math"
    """How answers are compared: `math`, equal as mathematics; `mathruler`, by the grader of the paper's code; `exact`,
    equal as text; `anls`, by the similarity ANLS."""
    repetition_weight: NonNegative = 0.0
    """Weight of the repetition penalty: this times the fraction of repeated n-grams is subtracted."""
    repetition_ngram: Count = 4
    """Number of words of such an n-gram."""
    function: str | None = None
    """Own function in place of the accuracy, written `module:function`. Its signature is `(response: str, answer: str,
    problem: str) -> float`; `response` begins with the think block where the chat template opens one."""
    timeout_s: Positive = 2.0
    """Seconds of processor time to compare one answer; an answer that takes longer is wrong."""
    overlong: OverlongConfig = OverlongConfig()
