"""Writing one file of the target, with a journal by which an interrupted conversion continues.

The journal has a line for each finished parameter, written after the parameter's bytes. A line's hashes say what the
bytes must be. Parameters before the last `synced` line were forced to disk. Those after it are in the file unless the
machine itself went down, so a conversion that continues reads them and compares. A last line that was cut short does
not count.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_papo.conversion.checkpoint_files import BoxSums
from megatron_papo.conversion.plan import ConversionPlan, Direction, FileUnit
from megatron_papo.conversion.stores import Files, parameter_bytes, write_rows
from megatron_papo.conversion.stream import Forms, Outcome, ParameterCopy, Stream, Wants
from megatron_papo.files.small_files import parse_record
from megatron_papo.model.parameter_map import ParameterEntry

FOLDER = "journal"
"""The folder of the journals, within the folder that is being written."""
SYNC_BYTES = 256 * 2**20
"""The number of bytes written between two calls that force them to disk, which run while writing goes on."""


@dataclass(frozen=True)
class JournalEntry:
    """A finished parameter, with its hashes in source and target: one hash, or one for each Hugging Face tensor."""

    name: str
    source: tuple[str, ...]
    cast: tuple[str, ...]
    """Hashes of the source's form after the cast to the target's dtype."""
    target: tuple[str, ...]
    changed: int
    """The number of values that the cast rounded."""
    boxes: tuple[str, ...] = ()
    """Checksums of its boxes, where the target is a checkpoint."""


@dataclass(frozen=True)
class Written:
    """What a journal says."""

    records: list[JournalEntry]
    num_synced: int
    """The parameters of so many records, from the first on, are known to be on disk."""


def read_journal(file: Path) -> Written:
    """What the journal says; nothing where there is no such file."""
    records: list[JournalEntry] = []
    num_synced = 0
    lines = file.read_bytes().split(b"\n")[:-1] if file.is_file() else []
    for line in lines:
        tree = parse_record(line)  # pages that never reached the disk read as zeros
        synced = None if tree is None else tree.get("synced")
        record = None if tree is None else _record(tree)
        if isinstance(synced, int):
            num_synced = synced
        elif record is not None:
            records.append(record)
        else:
            break
    return Written(records, min(num_synced, len(records)))


def _record(tree: dict[str, Any]) -> JournalEntry | None:
    """The entry of a parsed line; None for what is no line of a journal."""
    try:
        forms = {name: tuple(map(str, tree[name])) for name in ("source", "cast", "target")}
        forms["boxes"] = tuple(map(str, tree.get("boxes", ())))
        return JournalEntry(str(tree["name"]), **forms, changed=int(tree["changed"]))
    except (KeyError, TypeError, ValueError):
        return None


class Journal:
    """The journal of a file that is being written. It begins with the records that are known to be right.

    Two threads may use it.
    """

    def __init__(self, file: Path, records: Sequence[JournalEntry]):
        self.records = list(records)
        self._lock = threading.Lock()
        partial = file.with_name(f"{file.name}.tmp")
        with partial.open("wb") as handle:
            handle.write(b"".join(_line(asdict(record)) for record in records))
        partial.replace(file)
        self._handle = os.open(file, os.O_WRONLY | os.O_APPEND)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._handle)

    def append(self, record: JournalEntry) -> None:
        """Adds a line for a parameter whose bytes were written."""
        with self._lock:
            os.write(self._handle, _line(asdict(record)))
            self.records.append(record)

    def mark_synced(self, count: int) -> None:
        """Notes that the bytes of the first `count` records are on disk."""
        with self._lock:
            os.write(self._handle, _line({"synced": count}))
        os.fsync(self._handle)


def _line(tree: dict[str, object]) -> bytes:
    return json.dumps(tree, separators=(",", ":")).encode() + b"\n"


def journal_file(partial: Path, unit: FileUnit) -> Path:
    """Where the journal of a file of the target lies."""
    return partial / FOLDER / f"{unit.file}.jsonl"


def remaining_bytes(plan: ConversionPlan, partial: Path, unit: FileUnit) -> int:
    """The size of the parameters that are not in the journal."""
    done = {record.name for record in read_journal(journal_file(partial, unit)).records}
    return sum(parameter_bytes(plan.target, entry) for entry in unit.entries if entry.name not in done)


def convert_unit(
    plan: ConversionPlan, partial: Path, unit: FileUnit, chunk_bytes: int, moved: Callable[[int], None]
) -> int:
    """Writes what is not yet in the file. Returns the number of parameters that were in it already and are right."""
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
    """What is hashed when the source is read: the source's form as read, both forms as cast."""
    from_hf = direction == "hf-to-megatron"
    return Wants(read_parameter=not from_hf, read_sources=from_hf)


def record_of(outcome: Outcome, direction: Direction) -> JournalEntry:
    """The journal entry of a parameter that was read from the source."""
    from_hf = direction == "hf-to-megatron"
    return JournalEntry(
        outcome.entry.name, form(outcome.read, from_hf), form(outcome.cast, from_hf), form(outcome.cast, not from_hf),
        outcome.changed,
    )  # fmt: skip


def form(forms: Forms, huggingface: bool) -> tuple[str, ...]:
    """The hashes of the Hugging Face tensors, or that of the parameter."""
    return forms.sources if huggingface else forms.parameter


def _kept(plan: ConversionPlan, partial: Path, unit: FileUnit, chunk_bytes: int) -> list[JournalEntry]:
    """The records whose bytes are in the file: those forced to disk, and those whose hashes, computed anew, agree."""
    written: Written = read_journal(journal_file(partial, unit))
    known = {entry.name: entry for entry in unit.entries}
    records = [record for record in written.records if record.name in known]
    kept, doubtful = records[: written.num_synced], {record.name: record for record in records[written.num_synced :]}
    file = partial / unit.file
    if not file.exists() or file.stat().st_size < unit.num_bytes:
        return []  # its length is set before anything else
    hashes: dict[str, tuple[str, ...]] = {}
    from_hf = plan.direction == "hf-to-megatron"

    def done(outcome: Outcome) -> None:
        hashes[outcome.entry.name] = form(outcome.read, not from_hf)

    wants = Wants(read_parameter=from_hf, read_sources=not from_hf, cast_parameter=False, cast_sources=False)
    jobs = [ParameterCopy(known[name], *[plan.target.dtype(known[name])] * 2) for name in doubtful]
    Stream(plan.target, wants, chunk_bytes, done).run(jobs)
    return kept + [record for name, record in doubtful.items() if hashes[name] == record.target]


class _UnitWriter:
    """Writes rows and lines of the journal, and forces both to disk every `SYNC_BYTES`, on a thread of its own."""

    def __init__(self, plan: ConversionPlan, partial: Path, unit: FileUnit, files: Files, kept: list[JournalEntry]):
        self._plan, self._files, self._file = plan, files, unit.file
        self._journal_file, self._size = journal_file(partial, unit), unit.num_bytes
        self._kept, self._unsynced = kept, 0
        self._syncing: Future[None] | None = None
        around = dict(unit.around)
        self._sums = BoxSums(lambda box, offset, size: around[offset])
        self._box_sums: list[str] = []
        """Checksums of the boxes of the parameter that is being written."""

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
                    self._syncing.result()  # the kernel reports lost bytes once: a second sync would not
                self._sync(len(self._journal.records))
        finally:
            self._journal.close()

    def write(self, entry: ParameterEntry, start: int, stop: int, data: Tensor) -> None:
        """Writes rows `start : stop` of a parameter."""
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
        """Notes in the journal that a parameter is written."""
        record = record_of(outcome, self._plan.direction)
        self._journal.append(replace(record, boxes=tuple(self._box_sums)))
        self._box_sums = []

    def _sync(self, num_records: int) -> None:
        self._files.sync(self._file)
        self._journal.mark_synced(num_records)
