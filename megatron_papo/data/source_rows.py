"""The rows of one entry of `data.train` or `data.eval`: those that its filter lets pass, and the columns that are read.

What is common to all entries, and how a row becomes a prompt, is in `dataset.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megatron_papo.config import DataConfig, SourceConfig
from megatron_papo.data.columns import choose_columns, listed
from megatron_papo.data.fingerprint import fingerprint, fingerprints_of_rows
from megatron_papo.data.images import image_items
from megatron_papo.data.row_files import missing_columns
from megatron_papo.data.row_filter import passing_rows, rows_that_pass
from megatron_papo.data.source import open_source
from megatron_papo.text.untrusted import shortened

if TYPE_CHECKING:
    from datasets import Dataset

_ROWS_LOOKED_AT = 1024
"""For pictures, spread over the rows."""
_ROWS_COMPARED = 64
_MOST_SOURCES = 64
"""Different values of a `source_column`: each has its own metrics."""
_LONGEST_SOURCE = 64
_PLAIN = (str, int, float, bool, type(None))


class SourceRows:
    """One opened source. Its rows are numbered from 0, in the order of the file, those that pass its filter alone.

    `key` is the setting that names it, for messages. Raises ValueError for what cannot be read.
    """

    def __init__(self, data: DataConfig, source: SourceConfig, key: str, *, needs_answer: bool) -> None:
        self.config, self.key, self.origin = source, key, source.origin
        opened = open_source(source, key, data.image_roots)
        self.rows: Dataset = opened.rows
        self.images = opened.images
        self.columns = choose_columns(data, source, key, self.rows.features, needs_answer=needs_answer)
        if fault := missing_columns(opened.files, self._read_columns(needs_answer)):
            raise ValueError(f"{key}: {fault}")
        self.num_rows_unfiltered = len(self.rows)
        self._numbers = self._filter()
        self._check_source_column()
        self.answer_feature = self.rows.features.get(self.columns.answer)
        read = {self.columns.problem, self.columns.answer, self.columns.images}
        self._others = [name for name, kind in self.rows.features.items() if name not in read and not _is_picture(kind)]

    def __len__(self) -> int:
        return len(self.rows)

    def number_in_file(self, row: int) -> int:
        """The number of a row in the file or table that it was read from, rows that do not pass the filter counted."""
        return row if self._numbers is None else self._numbers[row]

    def pictures(self, cells: dict[str, Any]) -> list[Any]:
        """The images of a row, as the data set holds each."""
        return image_items(cells.get(self.columns.images)) if self.columns.images is not None else []

    def system(self, cells: dict[str, Any]) -> Any:
        """The cell of a row's system turn, as the data set holds it; None where none is read."""
        return None if self.columns.system is None else cells[self.columns.system]

    def source_of(self, cells: dict[str, Any]) -> str:
        """The name of the source of a row: the cell of `source_column`, or the entry's own name."""
        column = self.config.source_column
        cell = None if column is None else cells[column]
        return str(self.config.name) if cell is None else shortened(str(cell), _LONGEST_SOURCE)

    def other_cells(self, cells: dict[str, Any]) -> dict[str, Any]:
        """The cells that neither question, answer nor pictures are read from, of plain values alone."""
        return {name: cells[name] for name in self._others if _is_plain(cells[name])}

    def column(self, row: int, name: str) -> Any:
        """Any cell of a row; ValueError for an unknown column."""
        self._check_column(name)
        return self.rows[row][name]

    def column_values(self, name: str, key: str | None = None) -> list[Any]:
        """The cells of a column, a value for each row; ValueError for an unknown column, which the setting `key` names
        (None: this source's)."""
        self._check_column(name, key)
        return list(self.rows.select_columns([name])[:][name])

    def rows_passing(self, conditions: Mapping[str, Any] | str, key: str) -> list[int]:
        """The numbers of the rows that pass a filter, which the setting `key` holds. Raises ValueError for an unknown
        column, and for an error of the user's function."""
        return passing_rows(self.rows, conditions, key, self.origin)

    @property
    def lacks_image_column(self) -> bool:
        """Whether the column of pictures is not there, and null has not been said to mean that."""
        return self.columns.images is not None and self.columns.images not in self.rows.column_names

    def without_pictures(self) -> str | None:
        """Why this seems to be a data set of text alone, in words; None where a row has a picture.

        Looks at some of the rows, in their column of pictures alone, and decodes nothing.
        """
        column = self.columns.images
        if column is None:
            return "data.columns.images is null"
        if self.lacks_image_column:
            return f"{self.origin} has no column {column!r}"
        cells = self.rows.select_columns([column])
        places = range(0, len(cells), -(-len(cells) // _ROWS_LOOKED_AT))
        if any(image_items(cells[place][column]) for place in places):
            return None
        return f"none of {len(places)} rows of {self.origin}, which has {len(cells)}, holds a picture in {column!r}"

    def fingerprints(self, more_columns: Sequence[str], images: Callable[[int], Sequence[bytes]]) -> dict[str, str]:
        """Fingerprints of what is read of the rows, cells of `more_columns` included, and of what `images` gives of a
        row; see `fingerprint.py`."""
        read = (self.columns.problem, self.columns.answer, self.columns.system, *more_columns)
        columns = [name for name in dict.fromkeys(read) if name is not None and name in self.rows.column_names]
        return fingerprints_of_rows(self.rows, columns, images)

    def sample(self) -> tuple[int, str]:
        """The number of rows and, where a function made them, a fingerprint of a few questions: ranks compare these."""
        if self.config.function is None:
            return len(self), ""
        cells = self.rows.select_columns([self.columns.problem])
        places = range(0, len(cells), -(-len(cells) // _ROWS_COMPARED))
        return len(self), fingerprint(repr(cells[place]).encode() for place in places)

    def _check_column(self, name: str, key: str | None = None) -> None:
        """`key`: the setting that names the column; by default that of this source."""
        if name not in self.rows.column_names:
            has = listed(self.rows.features)
            raise ValueError(f"{key or self.key}: {self.origin} has no column {name!r}, has {has}")

    def _filter(self) -> list[int] | None:
        """Leaves out the rows that do not pass. Returns the numbers of those that do; None without a filter."""
        if self.config.filter is None:
            return None
        numbers = rows_that_pass(self.rows, self.config.filter, f"{self.key}.filter", self.origin)
        self.rows = self.rows.select(numbers)
        return numbers

    def _check_source_column(self) -> None:
        column, key = self.config.source_column, f"{self.key}.source_column"
        if column is None:
            return
        self._check_column(column, key)
        cells = self.rows.select_columns([column])
        names: set[str] = set()
        for batch in cells.iter(batch_size=1024):
            names |= {str(cell) for cell in batch[column]}
            if len(names) > _MOST_SOURCES:
                raise ValueError(
                    f"{key}: {column!r} of {self.origin} holds more than {_MOST_SOURCES} different names; each would "
                    "have its own metrics"
                )

    def _read_columns(self, needs_answer: bool) -> list[str]:
        """Those that are read of every row."""
        columns = [self.columns.problem]
        columns += [] if self.columns.system is None else [self.columns.system]
        columns += [self.columns.answer] if needs_answer else []
        images = self.columns.images
        return columns + ([images] if images is not None and images in self.rows.column_names else [])


def _is_picture(feature: Any) -> bool:
    """Whether a column holds pictures, or lists of them, by its type in `datasets`."""
    return re.match(r"Image|Video|Audio", type(getattr(feature, "feature", feature)).__name__) is not None


def _is_plain(value: Any) -> bool:
    """Whether a value is a text, a number, true, false, nothing, or made of these alone."""
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return all(map(_is_plain, value)) if isinstance(value, (list, tuple)) else isinstance(value, _PLAIN)
