"""Room on the disk of `run.dir` for everything that a run lets stand there: checkpoints and the export.

At its fullest a run has the newest `checkpoint.keep_last` checkpoints, the best one and the one that is being written,
and at its end the Hugging Face folder beside them. What is free is what the file system says; quotas of a folder count
where it shows them as its size, as XFS does, quotas of a user do not. Imports no torch.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_papo.config import Config
from megatron_papo.costs.memory import GIB, checkpoint_bytes, num_parameters, weight_bytes
from megatron_papo.model.shape import ModelShape

_MANY_STEPS = 10**6
"""For a run whose number of steps follows from epochs, before the data is read: as many as any run has."""


@dataclass(frozen=True)
class DiskNeed:
    """What may stand under `run.dir` at a time."""

    each: int
    """Bytes of one checkpoint."""
    most: int
    """Number of checkpoints at a time, the one that is being written among them."""
    export: int
    """Bytes of Hugging Face folders."""

    @property
    def total(self) -> int:
        return self.most * self.each + self.export

    def in_words(self) -> str:
        """`up to 4 checkpoints of 957.2 GiB and an export of 136.7 GiB: 3,965.5 GiB of disk`, as far as there are
        any."""
        plural = "s" * (self.most > 1)
        parts = [f"{f'up to {self.most} ' if plural else 'a '}checkpoint{plural} of {in_units(self.each)}"]
        parts += [f"an export of {in_units(self.export)}"] if self.export else []
        total = f": {in_units(self.total)} of disk" if self.most > 1 or self.export else " of disk"
        return " and ".join(parts) + total


def disk_need(verb: str, config: Config, shape: ModelShape) -> DiskNeed:
    """What a run of `verb`, `train` or `sft`, needs."""
    settings = config.checkpoint
    steps = (config.train if verb == "train" else config.sft).steps or _MANY_STEPS
    saves = math.ceil(steps / settings.save_every) if settings.save_every else 1
    best = verb == "train" and settings.keep_best and config.data.eval is not None
    if best:  # an evaluation may save too, when it is the best so far
        saves += steps // config.train.eval_every if config.train.eval_every else 1
    return DiskNeed(
        each=checkpoint_bytes(config, shape),
        most=max(1, min(settings.keep_last + best + 1, saves)),
        export=num_parameters(shape) * weight_bytes(config) if settings.export_at_end else 0,
    )


def faults_of_disk(verb: str, config: Config, shape: ModelShape) -> Iterator[str]:
    """A fault where the disk on which the run folder will lie has no room for what a run needs. What stands there
    already from an earlier attempt is room too."""
    folder, need = config.run.dir, disk_need(verb, config, shape)
    standing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    free = shutil.disk_usage(standing).free
    room = free + sum(_bytes_of(folder / name) for name in ("checkpoints", "export"))
    if need.total <= room:
        return
    helps = [
        *(["checkpoint.keep_last=1"] if need.most > 1 and config.checkpoint.keep_last > 1 else []),
        *(["checkpoint.keep_best=false"] if need.most > 1 and config.checkpoint.keep_best else []),
        *(["checkpoint.export_at_end=false"] if need.export else []),
        "a run.dir on another disk",
    ]
    yield f"run.dir: {folder}: {need.in_words()}, {in_units(free)} are free there: what helps is {' or '.join(helps)}"


def in_units(num_bytes: int) -> str:
    """`2.5 MiB` or `3,965.5 GiB`."""
    return f"{num_bytes / GIB:,.1f} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:.1f} MiB"


def _bytes_of(folder: Path) -> int:
    """Bytes of the files under `folder`; 0 where there is none, or none that can be looked at."""
    found = (Path(place, name) for place, _, names in os.walk(folder) for name in names)
    total = 0
    for file in found:
        try:
            total += file.lstat().st_size
        except OSError:
            continue
    return total
