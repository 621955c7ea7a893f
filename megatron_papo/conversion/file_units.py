"""One file of the target: what is in it already, and writing the rest, a journal line a parameter."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from megatron_papo.conversion.box_sums import BoxSums
from megatron_papo.conversion.hashing import Forms
from megatron_papo.conversion.journal import FOLDER, Journal, JournalEntry, Written, read_journal
from megatron_papo.conversion.plan import ConversionPlan, Direction, Unit, parameter_bytes
from megatron_papo.conversion.stores import Files, write_rows
from megatron_papo.conversion.stream import Outcome, ParameterCopy, Stream, Wants
from megatron_papo.model.parameter_map import ParameterEntry

SYNC_BYTES = 256 * 2**20
"""So much is written between two calls that force it to disk, beside the writing."""


def journal_file(partial: Path, unit: Unit) -> Path:
    return partial / FOLDER / f"{unit.file}.jsonl"


def remaining_bytes(plan: ConversionPlan, partial: Path, unit: Unit) -> int:
    """Of the parameters that the journal does not have."""
    done = {record.name for record in read_journal(journal_file(partial, unit)).records}
    return sum(parameter_bytes(plan.target, entry) for entry in unit.entries if entry.name not in done)


def convert_unit(
    plan: ConversionPlan, partial: Path, unit: Unit, chunk_bytes: int, moved: Callable[[int], None]
) -> int:
    """Writes what is not yet in the file; how many parameters were there already and are right."""
    kept = _kept(plan, partial, unit, chunk_bytes)
    done = {record.name for record in kept}
    pending = [entry for entry in unit.entries if entry.name not in done]
    with Files(partial, os.O_RDWR | os.O_CREAT) as files, _UnitWriter(plan, partial, unit, files, kept) as writer:
        for offset, data in unit.around:
            files.write(unit.file, offset, data)
        jobs = [ParameterCopy(entry, plan.source.dtype(entry), plan.target.dtype(entry)) for entry in pending]
        wants = source_wants(plan.direction)
        Stream(plan.source, wants, chunk_bytes, writer.done, writer.write, moved).run(jobs)
    return len(kept)


def source_wants(direction: Direction) -> Wants:
    """What a walk over the source hashes: the source's form as read, both forms as cast."""
    from_hf = direction == "hf-to-megatron"
    return Wants(read_parameter=not from_hf, read_sources=from_hf)


def record_of(outcome: Outcome, direction: Direction) -> JournalEntry:
    """Of a walk over the source."""
    from_hf = direction == "hf-to-megatron"
    return JournalEntry(
        outcome.entry.name, form(outcome.read, from_hf), form(outcome.cast, from_hf), form(outcome.cast, not from_hf),
        outcome.changed,
    )  # fmt: skip


def form(forms: Forms, huggingface: bool) -> tuple[str, ...]:
    return forms.sources if huggingface else forms.parameter


def _kept(plan: ConversionPlan, partial: Path, unit: Unit, chunk_bytes: int) -> list[JournalEntry]:
    """The journal's records whose bytes are in the file: those forced to disk, and those whose hashes agree."""
    written: Written = read_journal(journal_file(partial, unit))
    known = {entry.name: entry for entry in unit.entries}
    records = [record for record in written.records if record.name in known]
    kept, doubtful = records[: written.num_synced], {record.name: record for record in records[written.num_synced :]}
    file = partial / unit.file
    if not file.exists() or file.stat().st_size < unit.num_bytes:
        return []  # its length is set before anything else
    found: dict[str, tuple[str, ...]] = {}
    from_hf = plan.direction == "hf-to-megatron"

    def done(outcome: Outcome) -> None:
        found[outcome.entry.name] = form(outcome.read, not from_hf)

    wants = Wants(read_parameter=from_hf, read_sources=not from_hf, cast_parameter=False, cast_sources=False)
    jobs = [ParameterCopy(known[name], *[plan.target.dtype(known[name])] * 2) for name in doubtful]
    Stream(plan.target, wants, chunk_bytes, done).run(jobs)
    return kept + [record for name, record in doubtful.items() if found[name] == record.target]


class _UnitWriter:
    """Writes rows and journal lines, and forces both to disk every `SYNC_BYTES` on a thread of its own."""

    def __init__(self, plan: ConversionPlan, partial: Path, unit: Unit, files: Files, kept: list[JournalEntry]):
        self._plan, self._files, self._file = plan, files, unit.file
        self._journal_file, self._size = journal_file(partial, unit), unit.num_bytes
        self._kept, self._unsynced = kept, 0
        self._syncing: Future[None] | None = None
        around = dict(unit.around)
        self._sums = BoxSums(lambda box, offset, size: around[offset])
        self._box_sums: list[str] = []
        """Of the parameter that is being written."""

    def __enter__(self) -> _UnitWriter:
        os.ftruncate(self._files.handle(self._file), self._size)
        self._journal = Journal(self._journal_file, self._kept)
        self._thread = ThreadPoolExecutor(1)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown()
        try:
            if kind is None:
                if self._syncing is not None:
                    self._syncing.result()  # the kernel tells of bytes that it lost once, so another sync would not
                self._sync(len(self._journal.records))
        finally:
            self._journal.close()

    def write(self, entry: ParameterEntry, start: int, stop: int, data: Tensor) -> None:
        for strip, values in write_rows(self._files, self._plan.target, entry, start, stop, data):
            if strip.box is not None:
                num_bytes = strip.box.length * strip.box.width * self._plan.target.dtype(entry).itemsize
                digest = self._sums.add(strip.box, strip.offset, values, num_bytes)
                self._box_sums += [digest] if digest is not None else []
        self._unsynced += data.numel()
        if self._unsynced >= SYNC_BYTES and (self._syncing is None or self._syncing.done()):
            if self._syncing is not None:
                self._syncing.result()
            self._unsynced = 0
            self._syncing = self._thread.submit(self._sync, len(self._journal.records))

    def done(self, outcome: Outcome) -> None:
        record = record_of(outcome, self._plan.direction)
        self._journal.append(replace(record, boxes=tuple(self._box_sums)))
        self._box_sums = []

    def _sync(self, num_records: int) -> None:
        self._files.sync(self._file)
        self._journal.mark_synced(num_records)
