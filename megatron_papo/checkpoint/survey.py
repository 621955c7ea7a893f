"""What lies in the folder of a run's checkpoints, by names and state files: which are whole, and in which order.

A checkpoint is a folder of exactly the name that a run writes, with a state file of ours: anything else is somebody's
own. Leaves out the tensors: whether they are whole shows when they are read.
"""

from __future__ import annotations

import os
from collections.abc import Container, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_papo.checkpoint.state_file import is_checkpoint, read_state_file
from megatron_papo.distributed.agreement import DamagedCheckpoint
from megatron_papo.files.small_files import STEP_NAME

Found = tuple[Path, dict[str, Any]]
"""A checkpoint and its state file."""


@dataclass(frozen=True)
class Survey:
    whole: list[Found] = field(default_factory=list)
    """In the order in which they were written."""
    damaged: dict[Path, str] = field(default_factory=dict)
    """Each with the reason."""
    foreign: list[str] = field(default_factory=list)
    """Reasons of those that another version has written."""

    def newest(self, but: Container[Path] = ()) -> Found | None:
        return next((found for found in reversed(self.whole) if found[0] not in but), None)

    def best(self) -> Found | None:
        """Of the highest metric, the newest of equals."""
        return best_of(self.whole)


def survey(folder: Path, but: Container[Path] = ()) -> Survey:
    """Of all checkpoints under `folder` that are not in `but`."""
    found = Survey()
    for path in _folders(folder):
        if path in but:
            continue
        try:
            found.whole.append((path, read_state_file(path)))
        except DamagedCheckpoint as error:
            found.damaged[path] = str(error)
        except ValueError as error:
            if is_checkpoint(path):
                found.foreign.append(str(error))
            elif any(path.glob("*.distcp")):  # published with a state file, which is lost
                found.damaged[path] = str(error)
    found.whole.sort(key=lambda each: each[1]["serial"])
    return found


def best_of(found: list[Found]) -> Found | None:
    rated = [each for each in found if each[1].get("metric") is not None]
    return max(rated, key=lambda each: (each[1]["metric"], each[1]["serial"]), default=None)


def next_serial(folder: Path) -> int:
    """Steps do not order checkpoints when a run starts afresh in an old folder; this does."""
    serials = []
    for path in _folders(folder):
        with suppress(ValueError):
            serials.append(read_state_file(path)["serial"])
    return max(serials, default=0) + 1


def _folders(folder: Path) -> Iterator[Path]:
    """One that a process was killed while replacing is `NAME.old`, and its name is free."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        name = path.name.removesuffix(".old")
        waiting = name != path.name and not os.path.lexists(path.with_name(name))
        if STEP_NAME.fullmatch(name) and (name == path.name or waiting) and path.is_dir():
            yield path
