"""The section `reward`: the parts of a rollout's reward and their weights."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from megatron_papo.config.basics import Count, NonNegative, Positive, Section

BUILT_IN_PARTS = ("accuracy", "format", "repetition")
"""Parts of a reward that have a weight of their own among the settings, `reward.NAME_weight`."""


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
    """Own function in place of the accuracy, written `module:function`: `(rows: list[RewardRow]) -> list` of a number
    or a mapping of named parts a row, plain or `async def`; or `(response: str, answer: str, problem: str) -> float`.
    See docs/guides/plug_ins.md."""
    weights: dict[str, float] = {}
    """Weights of the named parts that reward.function returns, e.g. `{judge: 0.8, brevity: -0.1}`; 1 where a part is
    not named here. The parts accuracy, format and repetition have the weights above."""
    rows_per_call: Literal["one", "group", "all"] = "one"
    """Rows that reward.function is given at a time: one; the responses to one prompt; or all that a rank asks for. If a
    call of several rows raises, each of them has failed."""
    concurrency: Count | None = None
    """Calls of reward.function that a rank makes at a time; null: 32 of an `async def`, 1 of a plain function, which
    runs in a thread of its own."""
    function_timeout_s: Positive = 60.0
    """Seconds after which a call of reward.function, of the form with rows, has failed."""
    retries: Annotated[int, Field(ge=0, le=20)] = 0
    """How often rows for which reward.function, of the form with rows, failed are asked for again: after about 1 s,
    then 2, 4, up to 60."""
    on_failure: Literal["zero", "drop_group", "stop"] = "zero"
    """What becomes of a row for which reward.function raises, takes too long, or returns no finite number: its own
    parts are 0; or no response to its prompt is trained on; or the run ends. If all rows of a step fail, it always
    ends."""
    timeout_s: Positive = 2.0
    """Seconds of processor time to compare one answer; an answer that takes longer is wrong."""
    overlong: OverlongConfig = OverlongConfig()

    @model_validator(mode="after")
    def _weights_are_of_own_parts(self) -> Self:
        for name, weight in self.weights.items():
            if name in BUILT_IN_PARTS:
                raise ValueError(f"reward.weights.{name}: this part's weight is reward.{name}_weight")
            if not math.isfinite(weight):
                raise ValueError(f"reward.weights.{name}: {weight} is not finite")
        return self
