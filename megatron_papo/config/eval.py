"""The section `eval`: how `papo eval`, and the evaluations within a run, answer the held-out set."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from megatron_papo.config.basics import Count, NonNegative, Section


class EvalConfig(Section):
    samples: Count = 8
    """Number of answers to each question: k of avg@k."""
    temperature: NonNegative = 1.0
    """Sampling temperature; 0: greedy decoding."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Answers are sampled from the smallest set of tokens with this probability; null: generation.top_p."""
    top_k: Annotated[int, Field(ge=0)] | None = None
    """Answers are sampled from this many most probable tokens; 0: no limit; null: generation.top_k."""
    limit: Count | None = None
    """Number of rows to evaluate; null: all."""
    masked: bool = True
    """Whether the questions are also answered with the image masked, to report the difference in accuracy."""
