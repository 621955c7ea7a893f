"""Resumes a run from its newest checkpoint or, where that one is damaged, from the newest that is whole.

The user is warned of a damaged checkpoint, with file and reason. It is renamed, so that nobody takes it for a
checkpoint, and never deleted. If no checkpoint is whole, nothing is renamed and the run ends: otherwise it would begin
anew, and in time remove what may still be repaired.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_papo.checkpoint.state import Restored, TrainState, read_state
from megatron_papo.checkpoint.survey import Listed, survey
from megatron_papo.distributed.agreement import DamagedCheckpoint, read_on_first_rank
from megatron_papo.files.small_files import set_aside

Check = Callable[[Path, dict[str, Any]], None]
"""Called with the folder of a checkpoint and its state.json; raises ValueError if this run may not resume from it."""


@dataclass(frozen=True)
class Resumed:
    """The checkpoint that a run was resumed from."""

    folder: Path
    restored: Restored
    passed_over: set[Path] = field(default_factory=set)
    """Newer checkpoints that are damaged and could not be renamed; filled on rank 0 alone."""


def resume_newest(folder: Path, state: TrainState, check: Check, warn: Callable[[str], None]) -> Resumed | None:
    """Fills `state` from the newest whole checkpoint under `folder`, whatever layout wrote it; all ranks call it
    together. Returns None when there is no checkpoint.

    Raises ValueError, on every rank alike: what `check` and `read_state` raise; for a checkpoint of another version;
    and, naming every checkpoint and its fault, when all are damaged.
    """
    damaged: dict[Path, str] = {}
    while True:
        newest, broken = read_on_first_rank(partial(_newest, folder, damaged))
        damaged |= broken
        if newest is None:
            break
        check(*newest)
        try:
            restored = read_state(newest[0], state, warn)
        except DamagedCheckpoint as error:
            damaged[newest[0]] = str(error)
            continue
        writes = not dist.is_initialized() or dist.get_rank() == 0
        return Resumed(newest[0], restored, _out_of_the_way(damaged, newest[0], warn) if writes else set())
    if damaged:
        raise ValueError(
            f"run.dir: no checkpoint under {folder} is whole: {'; '.join(damaged.values())}; to begin anew, "
            "take another run.dir, or checkpoint.resume=false"
        )
    return None


def _newest(folder: Path, but: Container[Path]) -> tuple[Listed | None, dict[Path, str]]:
    """The newest whole checkpoint that is not in `but`, and those whose state files are damaged."""
    listed = survey(folder)
    if listed.foreign:
        raise ValueError(listed.foreign[0])
    return listed.newest(but), listed.damaged


def _out_of_the_way(damaged: Mapping[Path, str], chosen: Path, warn: Callable[[str], None]) -> set[Path]:
    """Renames the damaged checkpoints and warns of each; returns those that could not be renamed."""
    left = set()
    for path, reason in damaged.items():
        try:
            what = f"set aside as {set_aside(path, 'damaged').name}"
        except OSError as error:
            left.add(path)
            what = f"passed over, though not renamed: {error.strerror}"
        warn(f"damaged checkpoint: {reason}: {what}; the run goes on from {chosen.name}")
    return left
