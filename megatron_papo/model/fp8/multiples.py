"""Of what the number of tokens of a row must be a multiple. Imports no torch: asked before a rank starts."""

from __future__ import annotations

import math

_TOKENS = {"tensorwise": 16, "delayed": 16, "blockwise": 128, "mxfp8": 32}
"""What the product over tokens (the weight's gradient) reduces over: 16 bytes in FP8 as cuBLAS lays rows out, and whole
blocks where blocks share a scale."""
_TOKENS_OF_A_RANK = {"tensorwise": 8, "delayed": 8, "blockwise": 128, "mxfp8": 32}
"""Of a tensor rank's share, which Transformer Engine checks before it gathers tokens."""


def token_multiple(recipe: str, sequence_ranks: int) -> int:
    """What the number of tokens of a row must divide by; `sequence_ranks` share them, 1 without sequence parallelism.

    `recipe` is that of the pass: `off` where it does without FP8.
    """
    if recipe == "off":
        return sequence_ranks
    own = _TOKENS_OF_A_RANK[recipe] * sequence_ranks if sequence_ranks > 1 else 1
    return math.lcm(_TOKENS[recipe], own)


def row_padding(num_tokens: int, multiple: int, fixed: int | None) -> int:
    """Tokens to add. `fixed`: the length that every row gets; raises ValueError where one is longer already."""
    if fixed is None:
        return -num_tokens % multiple
    if num_tokens > fixed:
        raise ValueError(
            f"train.fixed_rows: a row of {num_tokens} tokens is longer than train.tokens_per_micro_batch={fixed}"
        )
    return fixed - num_tokens
