"""Which checkpoints the folder of a run has, by names and state files: which are whole, and in which order.

A checkpoint is a folder of exactly the name that a run writes, with a state.json of this package; anything else belongs
to somebody else. Tensors are not read: whether they are whole shows when they are loaded.
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

Listed = tuple[Path, dict[str, Any]]
"""The folder of a checkpoint, and the content of its state.json."""


@dataclass(frozen=True)
class Survey:
    """The checkpoints of a folder, as far as their state files tell."""

    whole: list[Listed] = field(default_factory=list)
    """The checkpoints with an intact state.json, in the order in which they were written."""
    damaged: dict[Path, str] = field(default_factory=dict)
    """The damaged checkpoints, each with the reason."""
    foreign: list[str] = field(default_factory=list)
    """A reason for each checkpoint that another version has written."""

    def newest(self, but: Container[Path] = ()) -> Listed | None:
        """The newest whole checkpoint that is not in `but`."""
        return next((listed for listed in reversed(self.whole) if listed[0] not in but), None)

    def best(self) -> Listed | None:
        """The whole checkpoint of the highest metric, the newest of equals."""
        return best_of(self.whole)


def survey(folder: Path, but: Container[Path] = ()) -> Survey:
    """Lists all checkpoints under `folder` that are not in `but`."""
    result = Survey()
    for path in _folders(folder):
        if path in but:
            continue
        try:
            result.whole.append((path, read_state_file(path)))
        except DamagedCheckpoint as error:
            result.damaged[path] = str(error)
        except ValueError as error:
            if is_checkpoint(path):
                result.foreign.append(str(error))
            elif any(path.glob("*.distcp")):  # published with a state file, which is lost
                result.damaged[path] = str(error)
    result.whole.sort(key=lambda listed: listed[1]["serial"])
    return result


def best_of(checkpoints: list[Listed]) -> Listed | None:
    """The checkpoint of the highest metric, the newest of equals; None when none has a metric."""
    rated = [listed for listed in checkpoints if listed[1].get("metric") is not None]
    return max(rated, key=lambda listed: (listed[1]["metric"], listed[1]["serial"]), default=None)


def next_serial(folder: Path) -> int:
    """The number of the next checkpoint: one more than the highest in `folder`.

    It orders checkpoints, since steps do not when a run starts anew in an old folder.
    """
    serials = []
    for path in _folders(folder):
        with suppress(ValueError):
            serials.append(read_state_file(path)["serial"])
    return max(serials, default=0) + 1


def _folders(folder: Path) -> Iterator[Path]:
    """The folders with the name of a checkpoint. If a process was killed while it replaced one, that is `NAME.old` and
    nothing has its name."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        name = path.name.removesuffix(".old")
        waiting = name != path.name and not os.path.lexists(path.with_name(name))
        if STEP_NAME.fullmatch(name) and (name == path.name or waiting) and path.is_dir():
            yield path
