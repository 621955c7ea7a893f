"""The head's sums over words for each row, tile by tile and rank by rank, and the results that follow from the sums.

A softmax is computed relative to its largest logit. Every sum is relative to the largest logit so far, and is rescaled
when a larger one comes; adding a tile and adding a rank are the same operation. Sums are fp64: each row has only a few,
and KL is a difference of them. Leaves out: where the sums of one tile come from (`torch_tile.py`, `triton_tile.py`).
Suffixes: R response tokens, N views of them (1, or policy and masked policy).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

FORBIDDEN = -1e30
"""Logit of a banned word: exp gives exactly 0, and 0 times it is 0, while 0 times -inf is NaN."""


@dataclass(frozen=True)
class RowSums:
    """Sums over words, for logits z of the policy and y of the masked policy, m the largest of each so far.

    With a = z - m, b = y - m: `exp` is the sum of exp(a), `dot` of exp(a) a, likewise for b in the second view.
    `gap` is the sum of exp(a) (a - b), `excess` of exp(b) - exp(a); both None with one view. `excess` is not the
    difference of the two `exp`: of nearly equal views that would be rounding alone.
    """

    max_NR: Tensor
    exp_NR: Tensor
    dot_NR: Tensor
    target_NR: Tensor
    """Logit of the target word; 0 until its tile has been added."""
    gap_R: Tensor | None = None
    excess_R: Tensor | None = None

    @classmethod
    def of_no_words(cls, num_views: int, num_rows: int, device: torch.device) -> RowSums:
        """The sums before any word has been added."""
        zeros = torch.zeros(3 * num_views + 2, num_rows, dtype=torch.float64, device=device)
        pair = (zeros[-2], zeros[-1]) if num_views == 2 else (None, None)
        return cls(torch.full_like(zeros[:num_views], FORBIDDEN), *zeros[: 3 * num_views].chunk(3), *pair)

    @classmethod
    def side_by_side(cls, parts: Sequence[RowSums]) -> RowSums:
        """The sums of several blocks of rows, joined in this order."""
        sums = [torch.cat(same, dim=-1) for same in zip(*(part._sums() for part in parts), strict=True)]
        return cls(torch.cat([part.max_NR for part in parts], dim=-1), *sums)

    def add(self, rows: slice, tile: RowSums) -> None:
        """Adds the sums over more words, those of a tile, for these rows."""
        mine = self._each(lambda part: part[..., rows])
        max_NC = torch.maximum(mine.max_NR, tile.max_NR)
        old, new = mine.rescaled(max_NC), tile.rescaled(max_NC)
        mine.max_NR.copy_(max_NC)
        for total, one, other in zip(mine._sums(), old._sums(), new._sums(), strict=True):
            torch.add(one, other, out=total)

    def over_ranks(self, group: dist.ProcessGroup | None) -> RowSums:
        """The sums over the words of all ranks, equal on each rank: one maximum and one sum over the group."""
        if group is None:
            return self
        max_NR = self.max_NR.clone()
        dist.all_reduce(max_NR, dist.ReduceOp.MAX, group=group)
        parts = self.rescaled(max_NR)._sums()
        packed = torch.cat([part.flatten() for part in parts])
        dist.all_reduce(packed, group=group)
        sums = [part.view_as(like) for part, like in zip(packed.split([p.numel() for p in parts]), parts)]
        return RowSums(max_NR, *sums)

    def rescaled(self, max_NR: Tensor) -> RowSums:
        """The same sums in fp64, relative to larger or equal maxima."""
        wide = self._each(Tensor.double)
        shift_NR = wide.max_NR - max_NR
        scale_NR = shift_NR.exp()
        exp_NR, dot_NR = wide.exp_NR * scale_NR, (wide.dot_NR + shift_NR * wide.exp_NR) * scale_NR
        if wide.gap_R is None or wide.excess_R is None:
            return RowSums(max_NR, exp_NR, dot_NR, wide.target_NR)
        apart_R = shift_NR[0] - shift_NR[1]
        gap_R = (wide.gap_R + apart_R * wide.exp_NR[0]) * scale_NR[0]
        # scale[1] - scale[0], of which rounding leaves nothing for nearly equal views: the tangent keeps its digits
        between_R = scale_NR.sum(0) * (-apart_R / 2).tanh()
        excess_R = wide.excess_R * scale_NR[1] + between_R * wide.exp_NR[0]
        return RowSums(max_NR, exp_NR, dot_NR, wide.target_NR, gap_R, excess_R)

    def _sums(self) -> list[Tensor]:
        parts = (self.exp_NR, self.dot_NR, self.target_NR, self.gap_R, self.excess_R)
        return [part for part in parts if part is not None]

    def _each(self, change: Callable[[Tensor], Tensor]) -> RowSums:
        return RowSums(change(self.max_NR), *map(change, self._sums()))

    @property
    def log_normaliser_NR(self) -> Tensor:
        """Log of the softmax's denominator."""
        return self.max_NR + self.exp_NR.log()

    @property
    def logprobs_NR(self) -> Tensor:
        """Log-probs of the target words."""
        return (self.target_NR - self.max_NR) - self.exp_NR.log()

    @property
    def entropy_NR(self) -> Tensor:
        """Entropies: the log of `exp`, which is at least 0, minus the mean of a, which is at most 0; so never
        negative."""
        return self.exp_NR.log() - self.dot_NR / self.exp_NR

    @property
    def kl_R(self) -> Tensor:
        """KL: the mean of a - b plus the log of exp_q / exp_p, where that ratio is 1 + excess / exp_p."""
        assert self.gap_R is not None and self.excess_R is not None
        p_R, q_R = self.exp_NR
        excess_R = self.excess_R / p_R
        # where views are far apart, the excess is nearly -1 and has lost digits that the quotient has
        log_R = torch.where(excess_R.abs() < 0.5, excess_R.log1p(), q_R.log() - p_R.log())
        return self.gap_R / p_R + log_R
