"""Checksums of boxes whose values stream by, a part at a time and in order: those that are read and those written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_papo.checkpoint.checksums import new_sum


@dataclass(frozen=True)
class Box:
    """Rows `row : row + length`, columns `column : column + width`, stored as `size` bytes from `offset` of `file`."""

    file: str
    offset: int
    size: int
    row: int
    length: int
    column: int
    width: int
    values: int | None
    """Where the values begin in the file; None: yet to be looked up."""


class BoxSums:
    """`around(box, offset, size)` gives bytes of the file that are not values, before or behind them."""

    def __init__(self, around: Callable[[Box, int, int], bytes]):
        self._around = around
        self._begun: dict[tuple[str, int], tuple[int, Any]] = {}

    def add(self, box: Box, offset: int, data: memoryview, num_bytes: int) -> str | None:
        """`data` lies at `offset`; the box's sum when these were the last of its `num_bytes` of values.

        Values that do not follow those before, read once more for another purpose, count for nothing.
        """
        assert box.values is not None
        key, end = (box.file, box.offset), box.values + num_bytes
        if offset == box.values:
            begun = new_sum()
            begun.update(self._around(box, box.offset, box.values - box.offset))
            self._begun[key] = offset, begun
        due, total = self._begun.get(key, (None, None))
        if total is None or due != offset:
            return None
        total.update(data)
        self._begun[key] = offset + len(data), total
        if offset + len(data) < end:
            return None
        total.update(self._around(box, end, box.offset + box.size - end))
        del self._begun[key]
        return total.hexdigest()
