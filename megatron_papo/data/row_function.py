"""Rows that a function of the user's own returns, as a table like that of a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron_papo.config.user_function import load_user_function
from megatron_papo.data.row_files import first_line

if TYPE_CHECKING:
    from datasets import Dataset


def rows_of_function(key: str, name: str, split: str, options: Mapping[str, Any]) -> Dataset:
    """What the function `name` (`module:function`), which setting `key` names, returns for `split` and `options`.

    Raises ValueError for a function that cannot be called so, one that fails, and what is no table of rows.
    """
    function, _ = load_user_function(key, name, ("split",), options=options)
    try:
        rows = function(split, **options)
    except Exception as error:  # the user's own code may raise anything
        raise ValueError(f"{key}: {name} failed: {type(error).__name__}: {first_line(error)}") from error
    try:
        return _as_table(rows)
    except Exception as error:  # columns of mixed types raise several kinds
        raise ValueError(f"{key}: the rows of {name} are no table: {first_line(error)}") from error


def _as_table(rows: Any) -> Dataset:
    """A row that lacks a column which others have gets nothing there."""
    from datasets import Dataset

    if isinstance(rows, Dataset):
        return rows
    if isinstance(rows, (str, bytes, Mapping)) or not hasattr(rows, "__iter__") or hasattr(rows, "features"):
        raise ValueError(f"it returned {type(rows).__name__}, not a datasets.Dataset or a list of dicts")
    listed = list(rows)
    if wrong := next((row for row in listed if not isinstance(row, Mapping)), None):
        raise ValueError(f"among them is {type(wrong).__name__}, not a dict")
    columns = dict.fromkeys(column for row in listed for column in row)
    return Dataset.from_dict({column: [row.get(column) for row in listed] for column in columns})
