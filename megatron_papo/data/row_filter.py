"""Which rows of a source are read: conditions on cells, or a function of the user's own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from megatron_papo.config.data_sources import CellRange
from megatron_papo.config.user_function import load_user_function
from megatron_papo.data.columns import listed
from megatron_papo.data.row_files import first_line

if TYPE_CHECKING:
    from datasets import Dataset

_ROWS_AT_ONCE = 1024
_WHOLE_ROWS_AT_ONCE = 32
"""Of rows with all their cells, pictures too."""


def rows_that_pass(rows: Dataset, conditions: Mapping[str, Any] | str, key: str, name: str) -> list[int]:
    """What `passing_rows` gives; raises ValueError also where no row passes."""
    kept = passing_rows(rows, conditions, key, name)
    if not kept:
        raise ValueError(f"{key}: none of the {len(rows)} rows of {name} passes")
    return kept


def passing_rows(rows: Dataset, conditions: Mapping[str, Any] | str, key: str, name: str) -> list[int]:
    """The numbers of the rows that pass, in order. `key` is the setting of the filter and `name` that of the source,
    for messages. Raises ValueError for an unknown column and for an error of the user's function."""
    if isinstance(conditions, str):
        passes = partial(_passes_function, load_user_function(key, conditions, ("row",))[0], f"{key}: {conditions}")
        cells = rows
    else:
        if gone := [column for column in conditions if column not in rows.column_names]:
            raise ValueError(f"{key}: {name} has no column {gone[0]!r}, has {listed(rows.features)}")
        passes, cells = partial(_passes_conditions, conditions), rows.select_columns(list(conditions))
    return list(_numbers(cells, passes, _WHOLE_ROWS_AT_ONCE if isinstance(conditions, str) else _ROWS_AT_ONCE))


def _numbers(cells: Dataset, passes: Callable[[int, dict[str, Any]], bool], at_once: int) -> Iterator[int]:
    for start in range(0, len(cells), at_once):
        columns = cells[start : start + at_once]
        for place in range(min(at_once, len(cells) - start)):
            row = {column: values[place] for column, values in columns.items()}
            if passes(start + place, row):
                yield start + place


def _passes_function(function: Callable[..., Any], where: str, number: int, row: dict[str, Any]) -> bool:
    try:
        return bool(function(row))
    except Exception as error:  # the user's own code may raise anything
        raise ValueError(f"{where}: row {number}: {type(error).__name__}: {first_line(error)}") from error


def _passes_conditions(conditions: Mapping[str, Any], number: int, row: dict[str, Any]) -> bool:
    return all(_holds(row[column], condition) for column, condition in conditions.items())


def _holds(cell: Any, condition: Any) -> bool:
    if isinstance(condition, CellRange):
        return cell is not None and _is_in_range(cell, condition)
    return any(_equal(cell, value) for value in (condition if isinstance(condition, list) else [condition]))


def _is_in_range(cell: Any, condition: CellRange) -> bool:
    if condition.matches is not None and re.search(condition.matches, str(cell)) is None:
        return False
    if condition.min is None and condition.max is None:
        return True
    try:
        number = float(cell)
    except (TypeError, ValueError):
        return False
    low, high = condition.min, condition.max
    return (low is None or number >= low) and (high is None or number <= high)


def _equal(cell: Any, value: Any) -> bool:
    """Whether they are equal; numbers, true and false also to a text that says them: all cells of a CSV are text."""
    if isinstance(cell, str) == isinstance(value, str):
        return isinstance(cell, bool) == isinstance(value, bool) and bool(cell == value)
    text, other = (cell, value) if isinstance(cell, str) else (value, cell)
    if isinstance(other, bool):
        return str(text).strip().lower() == str(other).lower()
    return isinstance(other, (int, float)) and _number(text) == other


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
