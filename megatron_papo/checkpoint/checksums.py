"""Checksums of a checkpoint: against disks that return other bytes than were written, not against attackers.

checksums.json has the sum of every box, by the file that the box lies in:

    {"hash": "xxh3_64", "boxes": {"__0_0.distcp": [[offset, length, sum], ...]}}

state.json has the sums of the other files, checksums.json among them, and its own (state_file.py). So a byte that
changed anywhere contradicts a sum. Boxes are checked by whoever reads them; small files are read and checked here.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from megatron_papo.distributed.agreement import DamagedCheckpoint

CHECKSUMS_FILE = "checksums.json"
HASH = "xxh3_64"
MOST_BYTES = 2**30
"""The most bytes that a small file may have; checksums.json of a million boxes has 200 MB."""

SumsByFile = dict[str, list[tuple[int, int, str]]]
"""Offset, length and sum of each box, by the name of its file."""


def new_sum() -> Any:
    """The sum of no bytes: an object with `update(bytes)` and `hexdigest()`."""
    return xxhash.xxh3_64()


def sum_of(data: Any) -> str:
    """The sum of all of `data`, in hexadecimal."""
    return xxhash.xxh3_64_hexdigest(data)


def write_box_sums(folder: Path, boxes: SumsByFile) -> None:
    """Writes checksums.json into `folder`."""
    tree = {"hash": HASH, "boxes": {file: sorted(several) for file, several in sorted(boxes.items())}}
    (folder / CHECKSUMS_FILE).write_text(json.dumps(tree, separators=(",", ":")) + "\n")


def file_sums(folder: Path, but: Iterable[str]) -> dict[str, str]:
    """The sums of the small files of `folder` by name: of all files that hold no boxes, except those in `but`."""
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and file.suffix != ".distcp"]
    return {file.name: sum_of(file.read_bytes()) for file in files if file.name not in but}


def read_small(file: Path) -> bytes:
    """The bytes of a small file. Raises DamagedCheckpoint for what is no file or too large, OSError for what cannot be
    read."""
    if not stat.S_ISREG(file.stat().st_mode):
        raise DamagedCheckpoint(f"{file}: is no file")
    with file.open("rb") as opened:
        data = opened.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise DamagedCheckpoint(f"{file}: more than {MOST_BYTES} bytes, which it cannot need")
    return data


def read_checked(folder: Path, name: str, sums: Mapping[str, str] | None) -> bytes:
    """The bytes of a small file, compared with its sum in `sums`.

    `sums` is None for a checkpoint of an older version, which has none. Raises DamagedCheckpoint when the sums differ,
    and when the file is missing.
    """
    file = folder / name
    try:
        data = read_small(file)
    except OSError as error:
        raise DamagedCheckpoint(f"{file}: {error.strerror}") from None
    if sums is not None and sums.get(name) != sum_of(data):
        raise DamagedCheckpoint(f"{file}: {DIFFERS}")
    return data


DIFFERS = "not what was written: its checksum differs"


def read_box_sums(folder: Path, sums: Mapping[str, str]) -> dict[tuple[str, int], tuple[int, str]]:
    """Length and sum of each box, by file and offset. Raises DamagedCheckpoint naming the file."""
    data = read_checked(folder, CHECKSUMS_FILE, sums)
    try:
        tree = json.loads(data)
        boxes = tree["boxes"].items()
        return {(file, offset): (length, digest) for file, several in boxes for offset, length, digest in several}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{folder / CHECKSUMS_FILE}: not a list of checksums: {error}") from None
