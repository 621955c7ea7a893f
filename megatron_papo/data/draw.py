"""The first stage of a step: each rank draws its share of the next prompts; a bad row is replaced, or ends the run."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megatron_papo.data.bad_rows import BadRow, BadRows
from megatron_papo.data.dataset import PromptDataset
from megatron_papo.data.masking import Masks
from megatron_papo.data.order import DataCursor, positions_for_step
from megatron_papo.types import Prompt


class DrawCancelled(Exception):
    """The draw is no longer needed."""


@dataclass(frozen=True)
class Draw:
    """What one call of `draw_prompts` gave this rank."""

    updates: tuple[tuple[Prompt, ...], ...]
    """Prompts by optimizer update."""
    positions: tuple[tuple[int, ...], ...]
    """Place of each prompt in the global order; the same shape."""
    cursor: DataCursor
    """Where the next draw begins, equal on all ranks."""

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts of all updates, in order."""
        return [prompt for chunk in self.updates for prompt in chunk]

    @property
    def places(self) -> list[int]:
        """The position of each of `prompts`."""
        return [place for chunk in self.positions for place in chunk]


def draw_prompts(
    dataset: PromptDataset,
    cursor: DataCursor,
    *,
    num_prompts: int,
    updates_per_step: int,
    data_rank: int,
    data_size: int,
    bad_rows: BadRows,
    masks: Masks | None = None,
    cancelled: threading.Event | None = None,
) -> Draw:
    """The next `num_prompts` prompts over all ranks, this rank's share of them, with their masked views if `masks`.

    A further round of dynamic sampling is a further call with the cursor of the last. Raises BadRow when
    `bad_rows.action` is `stop`, ValueError when no good row is left, and DrawCancelled at the prompt after another
    thread has set `cancelled`.
    """

    def fill(position: int) -> Prompt:
        if cancelled is not None and cancelled.is_set():
            raise DrawCancelled
        return _fill(dataset, cursor, position, bad_rows, masks)

    positions = positions_for_step(cursor, num_prompts, updates_per_step, data_rank, data_size)
    updates = tuple(tuple(fill(position) for position in chunk) for chunk in positions)
    return Draw(updates, positions, cursor.advance(num_prompts))


def prompts_of(
    dataset: PromptDataset, rows: Iterable[int], bad_rows: BadRows, masks: Masks | None = None
) -> Iterator[Prompt]:
    """The prompts of given rows in order, bad ones left out: evaluation replaces nothing."""
    for row in rows:
        try:
            yield dataset.prompt(row, masks)
        except BadRow as bad:
            bad_rows.add(bad)


def _fill(dataset: PromptDataset, cursor: DataCursor, position: int, bad_rows: BadRows, masks: Masks | None) -> Prompt:
    for row in cursor.rows(position):
        if row in bad_rows.by_row:
            continue
        try:
            return dataset.prompt(row, masks, visit=position)
        except BadRow as bad:
            bad_rows.add(bad)
    raise ValueError(f"data.{dataset.which}: no good row left in {dataset.name}: {bad_rows.in_words}")
