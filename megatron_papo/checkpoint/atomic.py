"""Folders that appear whole or not at all, also when the process is killed or the machine stops at any moment.

A folder is written as `NAME.tmp`, every file and directory of it is forced to disk, then it is renamed. A folder that
it replaces is `NAME.old` for the moment between two renames, and `recover` gives it its name back.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def publish(partial: Path, final: Path) -> None:
    """Gives the finished folder `partial` its name; an older `final` is replaced."""
    for folder, _, files in os.walk(partial):
        for file in files:
            sync(Path(folder) / file)
        sync(Path(folder))
    old = final.with_name(f"{final.name}.old")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    partial.rename(final)
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove(folder: Path) -> None:
    """Deletes a folder; killed half way, what is left is a `.tmp` that nobody takes for whole."""
    doomed = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    sync(folder.parent)
    shutil.rmtree(doomed)


def recover(parent: Path, pattern: str) -> None:
    """Clears up behind a process that was killed: `pattern` names the whole folders, e.g. `step_*`."""
    for old in parent.glob(f"{pattern}.old"):
        final = old.with_name(old.name.removesuffix(".old"))
        if final.exists():
            shutil.rmtree(old)
        else:
            old.rename(final)
    for partial in parent.glob(f"{pattern}.tmp"):
        shutil.rmtree(partial)


def sync(path: Path) -> None:
    """Forces a file's bytes, or a directory's entries, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
