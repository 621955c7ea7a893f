"""What is written already of one file of the target: a line a finished parameter, behind its bytes.

A line's hashes say what the bytes must be. Parameters before the last `synced` line were forced to disk; those behind
it are in the file unless the machine itself went down, so whoever goes on reads them and compares. A last line that
was cut short counts for nothing.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_papo.files.small_files import parse_record

FOLDER = "journal"
"""Within the folder that is being written."""


@dataclass(frozen=True)
class JournalEntry:
    """A finished parameter. Source and target are its forms there: one hash, or one a Hugging Face tensor."""

    name: str
    source: tuple[str, ...]
    cast: tuple[str, ...]
    """The source's form in the target's dtype."""
    target: tuple[str, ...]
    changed: int
    """Values that the cast rounded."""
    boxes: tuple[str, ...] = ()
    """Checksums of its boxes, in a checkpoint."""


@dataclass(frozen=True)
class Written:
    records: list[JournalEntry]
    num_synced: int
    """How many of the records' parameters are known to be on disk."""


def read_journal(file: Path) -> Written:
    """Empty where there is none."""
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
    """None for what no journal's line says."""
    try:
        forms = {name: tuple(map(str, tree[name])) for name in ("source", "cast", "target")}
        forms["boxes"] = tuple(map(str, tree.get("boxes", ())))
        return JournalEntry(str(tree["name"]), **forms, changed=int(tree["changed"]))
    except (KeyError, TypeError, ValueError):
        return None


class Journal:
    """The journal of a file that is being written, begun anew with the records that hold. Two threads may use it."""

    def __init__(self, file: Path, records: Sequence[JournalEntry]):
        self.records = list(records)
        self._lock = threading.Lock()
        partial = file.with_name(f"{file.name}.tmp")
        with partial.open("wb") as handle:
            handle.write(b"".join(_line(asdict(record)) for record in records))
        partial.replace(file)
        self._handle = os.open(file, os.O_WRONLY | os.O_APPEND)

    def close(self) -> None:
        os.close(self._handle)

    def append(self, record: JournalEntry) -> None:
        with self._lock:
            os.write(self._handle, _line(asdict(record)))
            self.records.append(record)

    def mark_synced(self, count: int) -> None:
        """The bytes of the first `count` records are on disk."""
        with self._lock:
            os.write(self._handle, _line({"synced": count}))
        os.fsync(self._handle)


def _line(tree: dict[str, object]) -> bytes:
    return json.dumps(tree, separators=(",", ":")).encode() + b"\n"
