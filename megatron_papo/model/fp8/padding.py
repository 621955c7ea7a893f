"""To what number of tokens a row is padded, and places of padding kept at zero.

FP8 products want tokens in multiples; sequence parallelism wants shares of one length. What is added at the end is
zero before the first layer and stays zero in every input and gradient of a linear layer: attention leaves it out, and
where a layer has biases (the vision tower) it is set to zero again. No maximum, loss or gradient sees it; in other
trainers padding that attended made gradients 40 to 500 times too large (TransformerEngine 2911, 2892).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def row_padding(num_tokens: int, multiple: int, fixed: int | None) -> int:
    """Tokens to add. `fixed`: the length that every row gets; raises ValueError where one is longer already."""
    if fixed is None:
        return -num_tokens % multiple
    if num_tokens > fixed:
        raise ValueError(
            f"train.fixed_rows: a row of {num_tokens} tokens is longer than train.tokens_per_micro_batch={fixed}"
        )
    return fixed - num_tokens


def zero_end(values: Tensor, num_padding: int, rank: int = 0, num_ranks: int = 1) -> Tensor:
    """[T / ranks, ...] with the last `num_padding` of the T places zero; no gradient flows there.

    `rank`: which of `num_ranks` shares of the row this is.
    """
    size = values.shape[0]
    keep = min(max(size * num_ranks - num_padding - rank * size, 0), size)
    if keep == size:
        return values
    return F.pad(values[:keep], (0, 0) * (values.dim() - 1) + (0, size - keep))
