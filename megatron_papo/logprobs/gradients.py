"""The head's backward around a tile: the factors of each row's logit gradients, and the sums of tiles' gradients.

Leaves out: the gradient of a tile itself (`torch_tile.py`, `triton_tile.py`).
Suffixes: R response tokens, C rows of a tile, W its words, V words of this shard, H hidden size, N views of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_papo.logprobs.tiling import Task, Tile, add_product, wide


@dataclass(frozen=True)
class RowPulls:
    """The factors that make the gradient of a tile of logits. With log-probs l = z - normaliser and p = exp(l), the
    gradient of logit z is p (constant + slope l + kl (l - l_masked)), and `target` is added for the target word. The
    gradient of a logit of the masked view is q (constant + slope l_masked) + kl (q - p), and again `target` for the
    target word."""

    normaliser_NR: Tensor
    constant_NR: Tensor
    target_NR: Tensor
    slope_NR: Tensor | None
    """None where no entropy has a gradient."""
    kl_R: Tensor | None
    """None where there is one view only."""

    @classmethod
    def of(
        cls, views: tuple[int, ...], task: Task, normaliser_NR: Tensor, entropy_NR: Tensor | None, kl_R: Tensor | None,
        upstream: Sequence[Tensor | None],
    ) -> RowPulls:  # fmt: skip
        """The factors from the gradients `upstream` of the outputs, in the order of HeadValues; None for one
        without."""
        index = list(views)
        zeros_R = torch.zeros_like(normaliser_NR[0])
        of_logprobs_NR = torch.stack([zeros_R if (g := upstream[2 * v]) is None else g for v in index]) * task.scale
        constant_NR, slope_NR, of_kl_R = -of_logprobs_NR, None, None
        if entropy_NR is not None and any(upstream[2 * v + 1] is not None for v in index):
            slope_NR = torch.stack([zeros_R if (g := upstream[2 * v + 1]) is None else g for v in index]) * -task.scale
            constant_NR = constant_NR + slope_NR * entropy_NR[index]
        if len(views) == 2:
            assert upstream[4] is not None and kl_R is not None
            of_kl_R = upstream[4] * task.scale
            constant_NR = torch.stack([constant_NR[0] - of_kl_R * kl_R, constant_NR[1]])
        return cls(normaliser_NR[index], constant_NR, of_logprobs_NR, slope_NR, of_kl_R)

    def rows(self, rows: slice) -> RowPulls:
        """The factors of these rows."""
        slope_NR, kl_R = (None if part is None else part[..., rows] for part in (self.slope_NR, self.kl_R))
        return RowPulls(self.normaliser_NR[:, rows], self.constant_NR[:, rows], self.target_NR[:, rows], slope_NR, kl_R)


class Gradients:
    """Sums of the tiles' gradients, in fp32 or wider: for each hidden state over the words, for a block of the weight
    over the rows. A block that is complete is cast to the weight's own dtype."""

    def __init__(self, hidden: Sequence[Tensor], weight_VH: Tensor, num_words: int, needed: Sequence[bool]):
        self._dtype = hidden[0].dtype
        self._hidden = [
            torch.zeros_like(hidden_RH, dtype=wide(hidden_RH.dtype)) if need else None
            for hidden_RH, need in zip(hidden, needed)
        ]
        self.weight_VH = torch.empty_like(weight_VH) if needed[2] else None
        if self.weight_VH is not None:
            self.weight_VH[num_words:].zero_()

    def add(self, tile: Tile, grads: Sequence[Tensor]) -> None:
        """Adds what follows from `grads`, the gradients of the tile's logits in each view."""
        for view, grad_CW in zip(tile.views, grads):
            total_RH = self._hidden[view]
            if total_RH is not None:
                add_product(total_RH[tile.rows], grad_CW, tile.weight_WH, first=False)
        if self.weight_VH is None:
            return
        place_WH = self.weight_VH[tile.words]
        if tile.is_first_of_words:
            self._block_WH = place_WH if wide(place_WH.dtype) == place_WH.dtype else place_WH.to(wide(place_WH.dtype))
        for which, (grad_CW, hidden_CH) in enumerate(zip(grads, tile.hidden)):
            add_product(self._block_WH, grad_CW.T, hidden_CH, first=tile.is_first_of_words and which == 0)
        if self._block_WH.dtype != place_WH.dtype:
            place_WH.copy_(self._block_WH)

    def hidden(self, view: int) -> Tensor | None:
        """The gradient of a view's hidden states; None where it is not needed."""
        total_RH = self._hidden[view]
        return None if total_RH is None else total_RH.to(self._dtype)
