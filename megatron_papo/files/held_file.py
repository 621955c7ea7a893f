"""Opens files that are not trusted: what a file is can be checked before it is read, without a race between the two.

Opening by name follows links, waits at a pipe without a writer and wakes devices. A descriptor of kind O_PATH does none
of that, and what is checked and then read is the same file, even if its name is exchanged meanwhile. Needs Linux's
/proc.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO


@dataclass(frozen=True)
class HeldFile:
    place: Path
    """The file's real path, with links resolved."""
    is_file: bool
    """Whether it is a regular file: no folder, pipe, socket or device."""
    num_bytes: int
    _descriptor: int

    def open(self) -> BinaryIO:
        """Opens the file for reading. Raises OSError."""
        assert self.is_file, "anything else may block whoever opens it"
        return open(f"/proc/self/fd/{self._descriptor}", "rb")


@contextmanager
def hold(path: Path) -> Iterator[HeldFile]:
    """Raises OSError, or ValueError for a name that no file can have."""
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        state = os.fstat(descriptor)
        place = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        yield HeldFile(place, stat.S_ISREG(state.st_mode), state.st_size, descriptor)
    finally:
        os.close(descriptor)


def read_small(path: Path, max_bytes: int) -> bytes:
    """The content of a regular file. Raises ValueError that names it for anything else, and for a larger one."""
    try:
        with hold(path) as held:
            if not held.is_file:
                raise ValueError(f"{path}: not a regular file")
            with held.open() as file:
                data = file.read(max_bytes + 1)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    if len(data) > max_bytes:
        raise ValueError(f"{path}: more than {max_bytes} bytes, which no file of its kind has")
    return data
