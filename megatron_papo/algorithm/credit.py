"""Credit: which share of its response's advantage each token receives.

One step of the objective, between the scores of a row and its policy loss. A method that gives tokens or responses
different credit is a function of the type `Credit`: token credit (for example only the tokens that depend most on the
image) and response credit (one factor for all tokens of a response) are the same kind of result, a weight a token.
What is normalised within a response is computed here, with `sequences.py`. What is normalised over the whole batch
cannot be: a micro-batch knows its own responses only.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from megatron_papo.algorithm.token_scores import TokenScores
from megatron_papo.types import MicroBatch

Credit = Callable[[TokenScores, MicroBatch], Tensor | None]
"""(detached scores, row) -> [R] factors >= 0 of the advantages, or None, which stands for 1 everywhere."""


def equal_credit(scores: TokenScores, row: MicroBatch) -> None:
    """Every token receives the advantage of its response as it is, as in GRPO and PAPO."""
