"""The names of metrics that docs/metrics.md explains, so that runs of the tests can be held to it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def undocumented(names: Iterable[str]) -> list[str]:
    """The names that neither stand in the page nor match a pattern of it, such as `time/<stage>`."""
    patterns = [re.compile(pattern) for pattern in _patterns()]
    return sorted(name for name in names if not any(pattern.fullmatch(name) for pattern in patterns))


def recorded_at_every_step() -> set[str]:
    """The names without a pattern whose column "when" is empty."""
    return {name for names, always in _rows() if always for name in names if "<" not in name}


@cache
def _patterns() -> tuple[str, ...]:
    names = [name for names, _ in _rows() for name in names]
    before = re.findall(r"\| `([^`]+)`[^|]*\|\n", PAGE.read_text().split("## Names that have changed")[1])
    return tuple(re.sub(r"<\w+>", ".+", re.escape(name)) for name in (*names, *before, "planned/time/hand over"))


def _rows() -> list[tuple[list[str], bool]]:
    """The names in the first cell of each row of the tables of metrics, and whether every step records them."""
    rows = [re.split(r"(?<!\\)\|", line) for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    return [(re.findall(r"`([^`]+)`", cells[1]), not cells[5].strip()) for cells in rows if len(cells) == 7]
