"""How often the rows of each source are drawn in an epoch: whole copies of all rows, and a random part of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_papo.data.random_state import random_state


@dataclass(frozen=True)
class Mixture:
    """The weights of sources that lie one behind the other in one numbered data set."""

    sizes: tuple[int, ...]
    """Rows of each source."""
    weights: tuple[float, ...]
    """How often each row of a source is drawn in an epoch, on average."""

    @property
    def is_plain(self) -> bool:
        """Whether every row is drawn once in each epoch."""
        return all(weight == 1 for weight in self.weights)

    def epoch_rows(self, rows: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """What epoch `epoch` draws of `rows`, which are numbers of rows in ascending order, [N] int64: [M] int64,
        ascending too, where a row that is drawn twice stands twice.

        A source has its number of rows times its weight, rounded, and at least one, in every epoch. What is left
        beyond whole copies is another random choice in each epoch, without repeats, made from `seed` and `epoch` alone.
        """
        parts, start = [], 0
        for place, (size, weight) in enumerate(zip(self.sizes, self.weights, strict=True)):
            own = rows[(rows >= start) & (rows < start + size)]
            start += size
            if len(own):
                copies, left = divmod(max(1, round(len(own) * weight)), len(own))
                chosen = random_state("mixture", seed, epoch, place).permutation(len(own))[:left]
                parts.append(np.sort(np.concatenate([np.tile(own, copies), own[chosen]])))
        return np.concatenate(parts)
