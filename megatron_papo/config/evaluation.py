"""The section `eval`: how held-out prompts are answered."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from megatron_papo.config.basics import Count, NonNegative, Section


class EvalConfig(Section):
    samples: Count = 8
    """k of avg@k."""
    temperature: NonNegative = 1.0
    """0 is greedy."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Null: generation.top_p."""
    top_k: Annotated[int, Field(ge=0)] | None = None
    """0: no limit; null: generation.top_k."""
    limit: Count | None = None
    """Rows to evaluate; null: all."""
    masked: bool = True
    """Also answer with the image masked, and report the gap."""
