"""What was found in the rows of a data set: plain values, from which the table and the page are made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_papo.data.bad_rows import BadRow

PERCENTILES = (5, 50, 95, 99)


@dataclass(frozen=True)
class MeasuredRow:
    """A row that can be a prompt, in numbers."""

    row: int
    source: str
    """Name of the data set that it comes from; empty where there is one."""
    num_tokens: int
    """Tokens of the prompt, image tokens included."""
    image_tokens: tuple[int, ...]
    """Of each picture."""
    sizes: tuple[tuple[int, int], ...]
    """Width and height of each picture as it is in the data set, in pixels."""
    seen_pixels: tuple[int, ...]
    """Area of each picture as the model sees it, in pixels."""
    answers: tuple[str, ...]
    """The right answers; empty where none is read."""
    digest: bytes
    """Of the problem and the pictures: equal for rows that ask the same."""
    response_tokens: int | None
    """Of the demonstration, with the end of the turn; None where none is read."""


@dataclass(frozen=True)
class DataSurvey:
    """All rows that were looked at."""

    verb: str
    which: str
    """`train` or `eval`."""
    name: str
    num_rows: int
    """Rows of the data set, those that were not looked at included."""
    num_read: int
    good: Sequence[MeasuredRow]
    bad: Sequence[BadRow]
    sources_of_bad: Sequence[str]
    """Name of the source of each bad row, empty where there is one source."""
    pixel_bounds: tuple[int, int]
    """The least and the most pixels of a picture as the model sees it."""
    seconds: float

    @property
    def pixels(self) -> list[int]:
        """Area of every picture as it is in the data set."""
        return [width * height for row in self.good for width, height in row.sizes]

    @property
    def seen_pixels(self) -> list[int]:
        """Area of every picture as the model sees it, in the order of `pixels`."""
        return [area for row in self.good for area in row.seen_pixels]

    @property
    def num_without_pictures(self) -> int:
        return sum(not row.sizes for row in self.good)

    @property
    def num_repeated(self) -> int:
        """Good rows that ask what an earlier one asks, of the same pictures."""
        return len(self.good) - len({row.digest for row in self.good})

    @property
    def sources(self) -> list[tuple[str, int, int]]:
        """(name, good rows, bad rows) of each source; one without a name where there is one."""
        good, bad = Counter(row.source for row in self.good), Counter(self.sources_of_bad)
        return [(name, good[name], bad[name]) for name in sorted(good | bad)]

    @property
    def reasons(self) -> list[tuple[str, int, BadRow]]:
        """(reason, rows, the first of them), most rows first."""
        first: dict[str, BadRow] = {}
        for bad in self.bad:
            first.setdefault(bad.reason, bad)
        return [(reason, num, first[reason]) for reason, num in Counter(bad.reason for bad in self.bad).most_common()]

    @property
    def figures(self) -> Mapping[str, Sequence[int]]:
        """Name -> the numbers that it stands for, one for each row or picture; only those that there are."""
        figures = {
            "prompt tokens": [row.num_tokens for row in self.good],
            "image tokens of a prompt": [sum(row.image_tokens) for row in self.good if row.sizes],
            "pictures of a row": [len(row.sizes) for row in self.good],
            "image tokens of a picture": [tokens for row in self.good for tokens in row.image_tokens],
            "longer edge of a picture, pixels": [max(size) for row in self.good for size in row.sizes],
            "pixels of a picture, in the data": self.pixels,
            "pixels of a picture, as the model sees it": self.seen_pixels,
            "tokens of a demonstration": [row.response_tokens for row in self.good if row.response_tokens is not None],
            "letters of an answer": [len(row.answers[0]) for row in self.good if row.answers],
        }
        return {name: values for name, values in figures.items() if values}


def percentiles(values: Sequence[int]) -> list[int]:
    """Least, those of PERCENTILES, and most; each of them is a value that is there."""
    return [int(value) for value in np.percentile(values, (0, *PERCENTILES, 100), method="closest_observation")]


def most_common(values: Iterable[str], number: int) -> list[tuple[str, int]]:
    return Counter(values).most_common(number)
