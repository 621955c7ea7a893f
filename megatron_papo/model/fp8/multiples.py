"""How far rows are padded: the multiple that their number of tokens must have under FP8 and sequence parallelism.

Imports no torch, since the command line checks settings with it before a rank starts.
"""

from __future__ import annotations

import math

_TOKENS = {"tensorwise": 16, "delayed": 16, "blockwise": 128, "mxfp8": 32}
"""Multiple for the tokens of a whole row, over which the product for the weight's gradient reduces: 16 bytes in FP8, as
cuBLAS lays rows out, and whole blocks where the values of a block share a scale."""
_TOKENS_OF_A_RANK = {"tensorwise": 8, "delayed": 8, "blockwise": 128, "mxfp8": 32}
"""Multiple for a tensor rank's share of the tokens, which Transformer Engine checks before it gathers tokens."""


def token_multiple(recipe: str, sequence_ranks: int) -> int:
    """The number that the tokens of a row must be a multiple of.

    `recipe`: that of the pass, `off` where it runs without FP8. `sequence_ranks`: the ranks that share the tokens of a
    row, 1 without sequence parallelism.
    """
    if recipe == "off":
        return sequence_ranks
    own = _TOKENS_OF_A_RANK[recipe] * sequence_ranks if sequence_ranks > 1 else 1
    return math.lcm(_TOKENS[recipe], own)


def patch_multiple(recipe: str, sequence_ranks: int, merge_unit: int) -> int:
    """The number that the patches of a vision tower must be a multiple of, so that a rank's share has whole blocks of
    `merge_unit` patches too. `recipe`: that of the tower's layers."""
    return math.lcm(merge_unit * sequence_ranks, token_multiple(recipe, sequence_ranks))


def row_padding(num_tokens: int, multiple: int, fixed: int | None) -> int:
    """The number of tokens to add to a row of `num_tokens`. `fixed`: the length that every row gets, if there is one;
    raises ValueError for a row that is longer."""
    if fixed is None:
        return -num_tokens % multiple
    if num_tokens > fixed:
        raise ValueError(
            f"train.fixed_rows: a row of {num_tokens} tokens is longer than train.tokens_per_micro_batch={fixed}"
        )
    return fixed - num_tokens
