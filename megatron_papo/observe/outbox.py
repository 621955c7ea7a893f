"""Writes the records of a run to a disk that may be full: nothing is lost or half written, and nothing ends the run.

Records are appended whole and files appear whole. What the disk does not take waits in memory, in order, and is tried
again with everything that follows. All records wait; of whole files, which may be large, only the newest.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_papo.files.small_files import write_atomically

MAX_FILES = 32
"""How many whole files wait at most."""


class Outbox:
    def __init__(self, warn: Callable[[str], None]):
        """`warn` is called when the disk stops taking data, and when it takes them again."""
        self._warn = warn
        self._records: dict[Path, list[bytes]] = {}
        self._files: dict[Path, bytes] = {}
        self.blocked = False
        """Whether something waits because the disk did not take it."""

    def append(self, path: Path, record: bytes) -> None:
        """Adds to the end of `path`, whose folder is made."""
        self._records.setdefault(path, []).append(record)

    def put(self, path: Path, content: bytes) -> None:
        """Writes the file `path` as a whole; an older one is replaced."""
        self._files.pop(path, None)
        self._files[path] = content
        for oldest in list(self._files)[:-MAX_FILES]:
            del self._files[oldest]

    def flush(self) -> None:
        """Writes what waits, as far as the disk takes it."""
        errors = [error for path in list(self._records) if (error := self._append(path))]
        errors += [error for path in list(self._files) if (error := self._put(path))]
        if errors and not self.blocked:
            self._warn(f"{errors[0].strerror}: {errors[0].filename}: what the run records of itself waits for room")
        elif self.blocked and not errors:
            self._warn("what the run had recorded of itself has been written, now that there is room")
        self.blocked = bool(errors)

    def close(self) -> None:
        """Tries a last time to write what waits, and warns of what is lost."""
        self.flush()
        for path, records in self._records.items():
            self._warn(f"{path}: the last {len(records)} records could not be written")
        for path in self._files:
            self._warn(f"{path}: could not be written")

    def _append(self, path: Path) -> OSError | None:
        records = self._records[path]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            while records:
                _append_whole(path, records[0])
                records.pop(0)
        except OSError as error:
            return error
        del self._records[path]
        return None

    def _put(self, path: Path) -> OSError | None:
        try:
            write_atomically(path, self._files[path])
        except OSError as error:
            return error
        del self._files[path]
        return None


def _append_whole(path: Path, record: bytes) -> None:
    with path.open("ab", buffering=0) as file:
        size = file.seek(0, 2)
        left = memoryview(record)
        try:
            while left:
                left = left[file.write(left) :]
        except OSError as error:
            file.truncate(size)  # of what a disk took before it was full
            raise OSError(error.errno, error.strerror, str(path)) from None
