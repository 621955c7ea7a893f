"""The section `reward`: what a response earns, part by part."""

from __future__ import annotations

from typing import Literal

from megatron_papo.config.basics import Count, NonNegative, Positive, Section


class OverlongConfig(Section):
    """DAPO's soft overlong punishment: from 0 to -penalty over the last `buffer` tokens before the limit."""

    enabled: bool = False
    """Whether long answers are punished."""
    buffer: Count = 512
    """Tokens before generation.max_response_tokens over which the penalty grows."""
    penalty: NonNegative = 1.0
    """At the limit."""


class RewardConfig(Section):
    accuracy_weight: NonNegative = 0.9
    """Weight of a right answer in the box."""
    format_weight: NonNegative = 0.1
    """Weight of a think block followed by a box."""
    accuracy: Literal["math", "mathruler", "exact", "anls"] = "math"
    """Equal as mathematics, by the grader of the paper's code, equal as text, or ANLS similarity."""
    repetition_weight: NonNegative = 0.0
    """Subtracted: weight x fraction of repeated n-grams."""
    repetition_ngram: Count = 4
    """Words of an n-gram."""
    function: str | None = None
    """`module:function(response: str, answer: str, problem: str) -> float`, replaces the accuracy part. `response`
    begins with the think block that the chat template opens, where it does."""
    timeout_s: Positive = 2.0
    """Processor time. An answer that takes longer to compare is wrong."""
    overlong: OverlongConfig = OverlongConfig()
