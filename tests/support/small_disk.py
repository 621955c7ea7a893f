"""A disk of a few megabytes, to be filled: a tmpfs, which takes the rights to mount one."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

FILLER = "filler"


@contextmanager
def small_disk(folder: Path, megabytes: float) -> Iterator[Path]:
    """Mounts it at `folder`; skips the test where that is not permitted."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={int(megabytes * 1024)}k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("a small disk takes the program mount, which is not here")
    if done.returncode:
        pytest.skip(f"a small disk takes the right to mount one: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, left: int = 0) -> None:
    """No more than `left` bytes stay free, in whole pages."""
    with (disk / FILLER).open("ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
        file.truncate(file.seek(0, 2) - left // 4096 * 4096)


def make_room(disk: Path) -> None:
    (disk / FILLER).unlink()
