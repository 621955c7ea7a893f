"""Which row comes when: a deterministic order, written as a function of a position that only grows.

Position p is row p mod n of epoch p div n; every epoch is its own shuffle, drawn from (seed, epoch). A step takes the
next positions and cuts them into one chunk an optimizer update; each chunk is cut over the data ranks. So neither the
order nor a prompt's update depends on how many ranks there are. A position whose row turns out bad is filled from
half an epoch further on, by every rank alike and without asking another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np


def random_state(*parts: str | int) -> np.random.RandomState:
    """A generator seeded from values that name what it is for; the same on every machine and numpy release.

    RandomState, because numpy froze its streams; blake2b, because Python's own hash differs between processes.
    """
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=16).digest()
    return np.random.RandomState(np.frombuffer(digest, dtype="<u4").astype(np.uint32))


@dataclass(frozen=True)
class DataCursor:
    """A place in the endless order of a dataset's rows. A value: `advance` returns another."""

    num_rows: int
    seed: int
    shuffle: bool = True
    position: int = 0
    """Prompts drawn since the run began, over all ranks and dynamic-sampling rounds."""

    def row(self, position: int, attempt: int = 0) -> int:
        """The row at `position`; attempts from 1 name its replacements, until every row of the epoch has been named.

        Raises ValueError when none is left.
        """
        if attempt >= self.num_rows:
            raise ValueError(f"no good row among {self.num_rows}")
        epoch, place = divmod(position, self.num_rows)
        # 1 .. n-1, beginning half an epoch away: there a replacement rarely meets its own step.
        away = 1 + (self.num_rows // 2 + attempt - 2) % (self.num_rows - 1) if attempt else 0
        place = (place + away) % self.num_rows
        return int(_shuffled(self.num_rows, self.seed, epoch)[place]) if self.shuffle else place

    def advance(self, num_prompts: int) -> DataCursor:
        return replace(self, position=self.position + num_prompts)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for json."""
        return {
            "num_rows": self.num_rows, "seed": self.seed, "shuffle": self.shuffle, "position": self.position,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> DataCursor:
        """This cursor moved to where `state` was taken; ValueError when that was another order."""
        for key, setting in (("num_rows", "rows of data.train"), ("seed", "run.seed"), ("shuffle", "data.shuffle")):
            if state[key] != getattr(self, key):
                raise ValueError(f"{setting}: the checkpoint has {state[key]}, this run {getattr(self, key)}")
        return replace(self, position=int(state["position"]))


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


@lru_cache(maxsize=4)
def _shuffled(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    return random_state("order", seed, epoch).permutation(num_rows)
