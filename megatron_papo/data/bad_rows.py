"""Rows that cannot be prompts: why, and what is done about them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from megatron_papo.text.untrusted import shortened

_MOST_LETTERS = 300


class BadRow(ValueError):
    """A row that cannot be a prompt. `reason` is one of a few, for counting; `detail` says more, shortly."""

    def __init__(self, row: int, reason: str, detail: str = "") -> None:
        detail = shortened(detail, _MOST_LETTERS)
        super().__init__(f"row {row}: {reason}" + (f" ({detail})" if detail else ""))
        self.row, self.reason, self.detail = row, reason, detail


@dataclass
class BadRows:
    """What to do about bad rows, and which were met: each row counts once."""

    action: Literal["skip", "stop"]
    found: dict[int, BadRow] = field(default_factory=dict)
    _num_named: int = 0

    def add(self, bad: BadRow) -> None:
        """Notes the row; with `stop`, raises it."""
        if self.action == "stop":
            raise bad
        self.found[bad.row] = bad

    def copy(self) -> BadRows:
        """The same rows, for a thread to add to; `merge` brings what it met back."""
        return BadRows(self.action, dict(self.found))

    def merge(self, other: BadRows) -> None:
        """Notes the rows of a copy too, in the order in which it met them."""
        self.found.update(other.found)

    def take_new(self) -> list[BadRow]:
        """Those met since the last call, to be named to the user."""
        new = list(self.found.values())[self._num_named :]
        self._num_named = len(self.found)
        return new

    @property
    def counts(self) -> dict[str, int]:
        """reason -> rows."""
        return dict(Counter(bad.reason for bad in self.found.values()))

    def __str__(self) -> str:
        return "\n".join(str(self.found[row]) for row in sorted(self.found)) or "no bad rows"
