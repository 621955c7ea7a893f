"""Rows that cannot be prompts: why, and what is done about them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from megatron_papo.text.untrusted import shortened

_MOST_LETTERS = 300


class BadRow(ValueError):
    """A row that cannot be a prompt. `reason` is one of a few, for counting; `detail` says more, shortly."""

    def __init__(self, row: int, reason: str, detail: str = "") -> None:
        self.row, self.reason, self.detail = row, reason, shortened(detail, _MOST_LETTERS)
        self.source, self.number = "", row
        super().__init__(str(self))

    def lies_in(self, source: str, number: int) -> None:
        """Says where the row lies: its number in its file, and the source where the data set has several."""
        self.source, self.number = source, number
        self.args = (str(self),)

    def named_by(self, key: str) -> str:
        """The text with the setting `key` in front; the name of one source among several begins with it already."""
        return str(self) if self.source else f"{key}: {self}"

    def __str__(self) -> str:
        place = f"{self.source}: row {self.number}" if self.source else f"row {self.number}"
        return f"{place}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


@dataclass
class BadRows:
    """What to do about bad rows, and which were met: each row counts once."""

    action: Literal["skip", "stop"]
    by_row: dict[int, BadRow] = field(default_factory=dict)
    """Row number -> why that row is bad, in the order in which they were met."""
    _num_named: int = 0

    def add(self, bad: BadRow) -> None:
        """Notes the row; with `stop`, raises it."""
        if self.action == "stop":
            raise bad
        self.by_row[bad.row] = bad

    def copy(self) -> BadRows:
        """The same rows, for a thread to add to; `merge` brings what it met back."""
        return BadRows(self.action, dict(self.by_row))

    def merge(self, other: BadRows) -> None:
        """Notes the rows of a copy too, in the order in which it met them."""
        self.by_row.update(other.by_row)

    def take_new(self) -> list[BadRow]:
        """Those met since the last call, to be named to the user."""
        new = list(self.by_row.values())[self._num_named :]
        self._num_named = len(self.by_row)
        return new

    @property
    def counts(self) -> dict[str, int]:
        """reason -> rows."""
        return dict(Counter(bad.reason for bad in self.by_row.values()))

    @property
    def first(self) -> str:
        """The first row of the data set among them, with its reason; empty where there is none."""
        return str(self.by_row[min(self.by_row)]) if self.by_row else ""

    @property
    def in_words(self) -> str:
        """`no answer 3, corrupt image 1; the first: row 5: no answer`, for messages of who gives up over them."""
        return reasons_in_words(self.counts, self.first)

    def __str__(self) -> str:
        return "\n".join(str(self.by_row[row]) for row in sorted(self.by_row)) or "no bad rows"


def reasons_in_words(counts: Mapping[str, int], first: str) -> str:
    """Reasons with how many rows each has, most rows first, and the first row; `first` as of `BadRows`."""
    listed = ", ".join(f"{reason} {number}" for reason, number in Counter(counts).most_common())
    return f"{listed}; the first: {first}" if listed else "no bad rows"
