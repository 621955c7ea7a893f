"""Rows of a whole parameter and rows of the Hugging Face tensors that it is made of, a range at a time.

A parameter is a matrix here: its rows are those of the name table (slices.py), a row is everything else of its shape,
one value for a vector. Imports nothing that reads a file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_papo.model.parameter_map import ParameterEntry


@dataclass(frozen=True)
class Span:
    """Rows `start : start + length` of one source are the rows from `row` on of the parameter."""

    source: int
    start: int
    row: int
    length: int


def spans(entry: ParameterEntry, start: int, stop: int) -> Iterator[Span]:
    """The sources' parts of rows `start : stop` of the parameter, in its order."""
    row = 0
    for run in entry.runs:
        first, last = max(start, row), min(stop, row + run.length)
        if last > first:
            yield Span(run.source, run.start + first - row, first, last - first)
        row += run.length


def source_spans(entry: ParameterEntry, source: int, start: int, stop: int) -> list[Span]:
    """Where rows `start : stop` of one source lie in the parameter, in the source's order."""
    found, row = [], 0
    for run in entry.runs:
        first, last = max(start, run.start), min(stop, run.start + run.length)
        if run.source == source and last > first:
            found.append(Span(source, first, row + first - run.start, last - first))
        row += run.length
    return sorted(found, key=lambda span: span.start)


def in_order(entry: ParameterEntry) -> bool:
    """True when whoever walks the parameter's rows meets each source's rows in the source's own order."""
    reached = [0] * len(entry.sources)
    for run in entry.runs:
        if run.start != reached[run.source]:
            return False
        reached[run.source] += run.length
    return True


def width(entry: ParameterEntry) -> int:
    """Values of a row."""
    return math.prod(entry.shape[1:])


def num_values(entry: ParameterEntry) -> int:
    return math.prod(entry.shape)


def chunks(num_rows: int, row_bytes: int, most_bytes: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of as many rows as `most_bytes` hold, but one at least."""
    step = max(1, most_bytes // row_bytes)
    for start in range(0, num_rows, step):
        yield start, min(start + step, num_rows)
