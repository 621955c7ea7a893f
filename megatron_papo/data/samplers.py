"""The user's own sampler, which `data.sampler` names: the rows of an epoch in the order that a function returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from megatron_papo.config.user_function import load_user_function

_KEY = "data.sampler"
_ARGUMENTS = ("num_rows", "epoch", "seed", "column")


def sampler_of(
    name: str, num_rows: int, seed: int, column: Callable[[str], Sequence[Any]]
) -> Callable[[int], np.ndarray]:
    """The function from an epoch to the rows that the sampler `name` (`module:function`) gives for it, [M] int64.

    `column`: from the name of a column to its cells. Raises ValueError naming the setting for a function that cannot be
    loaded; the function that is returned raises it for what the sampler raises, and for rows that are none.
    """
    function, _ = load_user_function(_KEY, name, _ARGUMENTS)

    def rows_of(epoch: int) -> np.ndarray:
        try:
            given = function(num_rows, epoch, seed, column)
        except Exception as error:  # the user's function may raise anything
            raise ValueError(f"{_KEY}: {name} failed for epoch {epoch}: {type(error).__name__}: {error}") from error
        return _checked(given, num_rows, f"{_KEY}: {name} gave epoch {epoch}")

    return rows_of


def _checked(given: Any, num_rows: int, where: str) -> np.ndarray:
    """The rows as an array; ValueError, which begins with `where`, for what are no numbers of rows."""
    try:
        rows = np.asarray(given if isinstance(given, np.ndarray) else list(given))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} no sequence of whole numbers: {error}") from None
    if rows.size == 0:
        raise ValueError(f"{where} no rows")
    if rows.ndim != 1 or rows.dtype.kind not in "iu":
        raise ValueError(f"{where} no sequence of whole numbers, but {rows.dtype} of shape {list(rows.shape)}")
    outside = rows[(rows < 0) | (rows >= num_rows)]
    if outside.size:
        raise ValueError(f"{where} row {outside[0]}, and data.train has rows 0 to {num_rows - 1}")
    return rows.astype(np.int64)
