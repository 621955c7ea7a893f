"""Folders that appear whole or not at all, also when the process is killed or the machine stops at any moment.

A folder is written as `NAME.tmp`, every file and directory of it is forced to disk, then it is renamed. A folder that
it replaces is `NAME.old` for the moment between two renames, and `recover` gives it its name back. Leftovers that
cannot be removed (permissions, a file that a network disk holds open) are reported and do not disturb later runs.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from megatron_papo.files.small_files import make_way, print_warning, sync

Warn = Callable[[str], None]


def publish(partial: Path, final: Path, warn: Warn = print_warning) -> None:
    """Gives the finished folder `partial` its name; an older `final` is replaced."""
    for folder, _, files in os.walk(partial):
        for file in files:
            sync(Path(folder) / file)
        sync(Path(folder))
    old = final.with_name(f"{final.name}.old")
    make_way(old, warn)
    if final.is_dir() and not final.is_symlink():
        final.rename(old)
    else:
        make_way(final, warn)
    partial.rename(final)
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)  # what is left of it, `recover` tries again


def remove(folder: Path, warn: Warn = print_warning) -> None:
    """Deletes a folder. If the process is killed meanwhile, a `.tmp` remains, which never counts as complete."""
    doomed = folder.with_name(f"{folder.name}.tmp")
    make_way(doomed, warn)
    folder.rename(doomed)
    sync(folder.parent)
    shutil.rmtree(doomed)


def recover(parent: Path, name: re.Pattern[str], warn: Warn = print_warning) -> None:
    """Clears up behind a process that was killed: `name` matches those of whole folders. Others' files, folders and
    links stay, and what cannot be removed is told of and tried again the next time."""
    for path in sorted(parent.iterdir()):
        whole, _, suffix = path.name.rpartition(".")
        if suffix not in ("tmp", "old") or not name.fullmatch(whole) or path.is_symlink() or not path.is_dir():
            continue
        try:
            if suffix == "old" and not os.path.lexists(parent / whole):
                path.rename(parent / whole)
            else:
                shutil.rmtree(path)
        except OSError as error:
            warn(f"{path}: left by a process that was killed, and cannot be removed: {error.strerror}")
