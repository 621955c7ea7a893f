"""Small files and folders on a disk that may fail: written atomically, read without trust, moved out of the way.

Imports the standard library only, for Python 3.9 and later: the supervisor of a cluster job reads by it, outside the
environment of the ranks. Leaves out what the files mean, and tensors.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

Made = TypeVar("Made")

STEP_NAME = re.compile(r"step_[0-9]{8,}")
"""The name that a run gives the checkpoint of a step; `step_00000006_backup` or `step_6` is a user's own folder."""


def sync(path: Path) -> None:
    """Forces a file's bytes, or a directory's entries, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, content: bytes | str, *, private: bool = False) -> None:
    """Writes the whole file or, with an OSError that names it, leaves it as it was before, also when the machine stops.
    `private`: only its owner can read it."""
    draft = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.unlink(missing_ok=True)
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666), "wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
        sync(draft)  # else a machine that stops may leave the new name with nothing behind it
        draft.replace(path)
    except OSError as error:
        with suppress(OSError):
            draft.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError, in one line that names it, for whatever else is there."""
    try:
        tree = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: holds no JSON object, but {type(tree).__name__}")
    return tree


def read_records(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file that holds one a line, in their order; none where nothing can be read.

    Left out is every line that is none: one that a crash cut short, or that a disk has spoilt.
    """
    with suppress(OSError):
        return [record for line in path.read_bytes().split(b"\n") if (record := parse_record(line)) is not None]
    return []


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Appends a line, also after one that a crash cut short. Makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        file.seek(0, 2)
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(record).encode() + b"\n")


def made_of(kind: type[Made], record: Mapping[str, Any]) -> Made | None:  # noqa: UP047 - Python 3.9 too
    """A dataclass of numbers and texts, made from its `asdict`; None if keys or types differ."""
    try:
        made = kind(**record)
    except TypeError:
        return None
    types = {"int": int, "float": (int, float), "str": str}
    fits = all(isinstance(getattr(made, field.name), types.get(str(field.type), object)) for field in fields(made))  # type: ignore[arg-type]
    return made if fits else None


def parse_record(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a line; None for anything else."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def print_warning(text: str) -> None:
    with suppress(OSError):
        print(f"papo: warning: {text}", file=sys.stderr, flush=True)


def set_aside(path: Path, word: str) -> Path:
    """Renames a file, folder or link to `NAME.word`, or `NAME.word-2` and so on. Returns the new path."""
    for number in itertools.count(1):
        free = path.with_name(f"{path.name}.{word}" + (f"-{number}" if number > 1 else ""))
        if not os.path.lexists(free):
            break
    path.rename(free)
    return free


def make_way(path: Path, warn: Callable[[str], None] = print_warning) -> None:
    """Frees the name `path`. A folder of ours is removed, a link too, but not what it points to; a plain file, or what
    cannot be removed, is set aside. Raises OSError when even that fails."""
    if not os.path.lexists(path):
        return
    reason = "is a file where a folder belongs"
    try:
        if path.is_symlink():
            where = os.readlink(path)
            path.unlink()
            warn(f"{path}: was a link: removed, and {where} left as it is")
            return
        if path.is_dir():
            shutil.rmtree(path)
            return
    except OSError as error:
        reason = f"cannot be removed: {error.strerror}: {error.filename}"
    aside = set_aside(path, "aside")
    warn(f"{path}: {reason}: set aside as {aside.name}")
