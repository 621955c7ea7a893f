"""A place in the order of a data set's rows, and the positions that a step draws next.

A position counts the prompts that were drawn before it, and only grows; `epochs.py` says which row it is. A step takes
the next positions and cuts them into one chunk an optimizer update; each chunk is cut over the data ranks. So neither
the order nor a prompt's update depends on how many ranks there are. A position whose row turns out bad is filled from
half an epoch further on, by every rank alike and without asking another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np

from megatron_papo.data.epochs import RowOrder, Stage, rows_as_they_are, shuffled_rows
from megatron_papo.data.fingerprint import fingerprint


@dataclass(frozen=True)
class DataCursor:
    """A place in the endless order of a dataset's rows. A value: `advance` returns another."""

    num_rows: int
    seed: int
    shuffle: bool = True
    position: int = 0
    """Prompts drawn since the run began, over all ranks and dynamic-sampling rounds."""
    special: RowOrder | None = field(default=None, compare=False, repr=False)
    """The order, where it is another than all rows in each epoch, shuffled or as they are."""

    @property
    def order(self) -> RowOrder:
        """Which row comes at which position."""
        return self.special or _plain_order(self.num_rows, self.seed, self.shuffle)

    def rows(self, position: int) -> Iterator[int]:
        """The row at `position` and then its replacements, until every row of the epoch has been named."""
        _, place, rows = self.order.at(position)
        for attempt in range(len(rows)):
            # 1 .. n-1, beginning half an epoch away: there a replacement rarely meets its own step.
            away = 1 + (len(rows) // 2 + attempt - 2) % (len(rows) - 1) if attempt else 0
            yield int(rows[(place + away) % len(rows)])

    def advance(self, num_prompts: int) -> DataCursor:
        return replace(self, position=self.position + num_prompts)

    def where(self) -> str:
        """The place in words: the epoch, counted from 0, and how many of its rows were drawn."""
        epoch, place, rows = self.order.at(self.position)
        return f"epoch {epoch}, row {place} of {len(rows)}"

    def order_fingerprint(self) -> str:
        """A few letters that stand for the order, or its name where it is a plain one."""
        return plain_order(self.shuffle) if self.special is None else self.special.fingerprint()

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for json; for an order of its own also a fingerprint of the epoch that was drawn from."""
        state: dict[str, Any] = {
            "num_rows": self.num_rows, "seed": self.seed, "shuffle": self.shuffle, "position": self.position,
        }  # fmt: skip
        return state if self.special is None else {**state, "epoch_rows": self._epoch_rows(self.position)}

    def load_state_dict(self, state: dict[str, Any], *, other_data: bool = False) -> DataCursor:
        """This cursor moved to where `state` was taken.

        Raises ValueError when that was another order, unless `other_data` allows it: then as many prompts count as
        drawn of the order that holds now.
        """
        position = int(state["position"])
        if state["seed"] != self.seed:
            raise ValueError(f"run.seed: the checkpoint has {state['seed']}, this run {self.seed}")
        for key, setting in (("num_rows", "rows of data.train"), ("shuffle", "data.shuffle")):
            if state[key] != getattr(self, key) and not other_data:
                raise ValueError(f"{setting}: the checkpoint has {state[key]}, this run {getattr(self, key)}")
        kept = state.get("epoch_rows")
        if kept is not None and self.special is not None and not other_data and kept != self._epoch_rows(position):
            raise ValueError(
                "data: the epoch that the checkpoint was drawing from has other rows, or another order of them, than "
                "then: a data.sampler must give the same for the same arguments"
            )
        return replace(self, position=position)

    def _epoch_rows(self, position: int) -> str:
        """The fingerprint of the epoch of the last prompt before `position`."""
        _, _, rows = self.order.at(max(position - 1, 0))
        return fingerprint([rows.astype("<i8").tobytes()])


def share_of[Item](items: Sequence[Item], rank: int, size: int) -> Sequence[Item]:
    """The contiguous share of one of `size` ranks; they differ by at most one item and make up the whole in order."""
    assert 0 <= rank < size
    return items[len(items) * rank // size : len(items) * (rank + 1) // size]


def positions_for_step(
    cursor: DataCursor, num_prompts: int, updates_per_step: int, data_rank: int, data_size: int
) -> tuple[tuple[int, ...], ...]:
    """Positions that this rank draws next, one tuple an optimizer update; `num_prompts` counts all ranks."""
    if num_prompts % updates_per_step:
        raise ValueError(f"{num_prompts} prompts do not divide into {updates_per_step} updates")
    size = num_prompts // updates_per_step
    chunks = [range(start, start + size) for start in range(cursor.position, cursor.position + num_prompts, size)]
    return tuple(tuple(share_of(chunk, data_rank, data_size)) for chunk in chunks)


def plain_order(shuffle: bool) -> str:
    """The name of the order of all rows in each epoch, shuffled or as they are."""
    return "shuffled" if shuffle else "as they are"


@lru_cache(maxsize=4)
def _plain_order(num_rows: int, seed: int, shuffle: bool) -> RowOrder:
    """All rows in each epoch."""
    return RowOrder([Stage(np.arange(num_rows))], shuffled_rows(seed) if shuffle else rows_as_they_are)
