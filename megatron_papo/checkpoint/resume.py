"""Where a run goes on: at its newest checkpoint, or at the newest that is whole where that one is damaged.

A damaged checkpoint is told of, with the file and the reason, and set aside under a name that nobody takes for a
checkpoint's; it is never deleted. Where none is whole nothing is renamed and the run ends: it would else begin anew,
and in time remove what may yet be repaired.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_papo.checkpoint.state import Restored, TrainState, read_state
from megatron_papo.checkpoint.survey import Found, survey
from megatron_papo.distributed.agreement import DamagedCheckpoint, read_on_first_rank
from megatron_papo.files.small_files import set_aside

Check = Callable[[Path, dict[str, Any]], None]
"""Of a checkpoint and its state file: raises ValueError for one that this run may not go on from."""


@dataclass(frozen=True)
class Resumed:
    folder: Path
    restored: Restored
    passed_over: set[Path] = field(default_factory=set)
    """Newer ones, damaged, that could not be renamed; known on rank 0."""


def resume_newest(folder: Path, state: TrainState, check: Check, warn: Callable[[str], None]) -> Resumed | None:
    """Fills `state` from the newest checkpoint under `folder` that is whole, whatever layout wrote it; None when there
    is no checkpoint. Collective.

    Raises ValueError on every rank alike: as `check` and `read_state`, for a checkpoint of another version, and naming
    every checkpoint and its fault when all are damaged.
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


def _newest(folder: Path, but: Container[Path]) -> tuple[Found | None, dict[Path, str]]:
    """The newest whole one that is not in `but`, and those whose state files are damaged."""
    found = survey(folder)
    if found.foreign:
        raise ValueError(found.foreign[0])
    return found.newest(but), found.damaged


def _out_of_the_way(damaged: Mapping[Path, str], chosen: Path, warn: Callable[[str], None]) -> set[Path]:
    """Renames them; those that could not be."""
    left = set()
    for path, reason in damaged.items():
        try:
            what = f"set aside as {set_aside(path, 'damaged').name}"
        except OSError as error:
            left.add(path)
            what = f"passed over, though not renamed: {error.strerror}"
        warn(f"damaged checkpoint: {reason}: {what}; the run goes on from {chosen.name}")
    return left
