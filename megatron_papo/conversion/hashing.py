"""Hashes of a parameter as its rows stream by: in both forms, the one parameter and the tensors it is made of.

Both come from one walk over the parameter's rows. Where that walk meets a source's rows in another order than the
source's own (queries, keys and values of the vision tower, per head), the source is read once more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from megatron_papo.conversion.spans import Span, in_order, source_spans, spans, width
from megatron_papo.model.parameter_map import ParameterEntry

HASH = "sha256"


@dataclass(frozen=True)
class Forms:
    """Hexadecimal hashes of one parameter's values."""

    parameter: tuple[str, ...]
    """One, or none where it was not asked for."""
    sources: tuple[str, ...]
    """One a Hugging Face tensor, in the order of `entry.sources`; or none."""


class Hasher:
    """Of one parameter in one dtype."""

    def __init__(self, entry: ParameterEntry, itemsize: int, parameter: bool = True, sources: bool = True):
        self._entry, self._row_bytes = entry, width(entry) * itemsize
        self._wants_parameter, self._wants_sources = parameter, sources
        self._same = len(entry.runs) == 1
        self._ordered = in_order(entry)
        self._whole = hashlib.new(HASH)
        self._parts = [hashlib.new(HASH) for _ in entry.sources]

    def updates(self, start: int, stop: int, data: memoryview) -> list[Callable[[], None]]:
        """Rows `start : stop`, in order and each once: what is to be called, on any threads."""
        calls: list[Callable[[], None]] = []
        if self._wants_parameter or self._same:
            calls.append(lambda: self._whole.update(data))
        if self._wants_sources and self._ordered and not self._same:
            calls.append(lambda: self._update_parts(start, stop, data))
        return calls

    def _update_parts(self, start: int, stop: int, data: memoryview) -> None:
        for span in spans(self._entry, start, stop):
            first = (span.row - start) * self._row_bytes
            self._parts[span.source].update(data[first : first + span.length * self._row_bytes])

    def finish(self, read: Callable[[Span], memoryview], most_bytes: int) -> Forms:
        """`read` gives rows of the parameter again, at most `most_bytes` at once (but a row)."""
        if self._wants_sources and not self._ordered:
            step = max(1, most_bytes // self._row_bytes)
            for source, tensor in enumerate(self._entry.sources):
                for span in source_spans(self._entry, source, 0, tensor.shape[0]):
                    for done in range(0, span.length, step):
                        part = Span(source, span.start + done, span.row + done, min(step, span.length - done))
                        self._parts[source].update(read(part))
        whole = (self._whole.hexdigest(),)
        parts = whole if self._same else tuple(part.hexdigest() for part in self._parts)
        return Forms(whole if self._wants_parameter else (), parts if self._wants_sources else ())
