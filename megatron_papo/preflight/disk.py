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


@dataclass(frozen=True)
class DiskNeed:
    """What may stand under `run.dir` at a time: numbers of checkpoints and of exports, those that are being written
    among them, and the bytes of each."""

    checkpoints: int
    checkpoint_bytes: int
    exports: int
    export_bytes: int

    @property
    def total(self) -> int:
        return self.checkpoints * self.checkpoint_bytes + self.exports * self.export_bytes

    def in_words(self) -> str:
        """`up to 4 checkpoints of 957.2 GiB and an export of 136.7 GiB: 3,965.5 GiB of disk`, or `nothing saved`."""
        kinds = (
            (self.checkpoints, "a checkpoint", "checkpoints", self.checkpoint_bytes),
            (self.exports, "an export", "exports", self.export_bytes),
        )
        parts = [
            f"{one if number == 1 else f'up to {number} {several}'} of {in_units(each)}"
            for number, one, several, each in kinds
            if number
        ]
        total = f": {in_units(self.total)} of disk" if self.checkpoints + self.exports > 1 else ""
        return " and ".join(parts) + total if parts else "nothing saved"


def disk_need(verb: str, config: Config, shape: ModelShape) -> DiskNeed:
    """What a run of `verb`, `train` or `sft`, needs."""
    steps = (config.train if verb == "train" else config.sft).steps
    each = checkpoint_bytes(config, shape)
    return DiskNeed(
        checkpoints=_most_checkpoints(verb, config, steps) if each else 0,
        checkpoint_bytes=each,
        exports=_most_exports(config, steps),
        export_bytes=num_parameters(shape) * weight_bytes(config),
    )


def _most_checkpoints(verb: str, config: Config, steps: int | None) -> int:
    settings, every = config.checkpoint, config.train.eval_every
    best = verb == "train" and settings.keep_best and config.data.eval is not None
    most = settings.keep_last + best + 1
    if steps is None:  # they follow from epochs, once the data is read
        return most
    saves = math.ceil(steps / settings.save_every) if settings.save_every else 1
    if best:  # an evaluation may save too, when it is the best so far
        saves += steps // every if every else 1
    return max(1, min(most, saves))


def _most_exports(config: Config, steps: int | None) -> int:
    """Of a run whose steps follow from epochs, and which keeps all exports, only one of them is counted."""
    settings = config.checkpoint
    at_end, keep = int(settings.export_at_end), settings.keep_exports
    if not settings.export_every:
        return at_end
    if steps is None:
        return keep + 1 if keep else 1 + at_end
    written = steps // settings.export_every
    if keep is None:
        return written + at_end
    return max(min(written, keep + 1), min(written, keep) + at_end)  # one is written before another is removed


def faults_of_disk(verb: str, config: Config, shape: ModelShape) -> Iterator[str]:
    """A fault where the disk on which the run folder will lie has no room for what a run needs. What stands there
    already from an earlier attempt is room too."""
    folder, need = config.run.dir, disk_need(verb, config, shape)
    standing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    free = shutil.disk_usage(standing).free
    if need.total <= free + sum(_bytes_of(folder / name) for name in ("checkpoints", "exports", "export")):
        return
    helps = list(_remedies(need, config))
    yield f"run.dir: {folder}: {need.in_words()}, {in_units(free)} are free there: what helps is {' or '.join(helps)}"


def _remedies(need: DiskNeed, config: Config) -> Iterator[str]:
    settings = config.checkpoint
    if need.checkpoints > 1 and settings.keep_last > 1:
        yield "checkpoint.keep_last=1"
    if need.checkpoints > 1 and settings.keep_best:
        yield "checkpoint.keep_best=false"
    if settings.contents == "full":
        yield "checkpoint.contents=weights"
    if need.exports > 1 and settings.export_every and settings.keep_exports != 1:
        yield "checkpoint.keep_exports=1"
    if settings.export_at_end:
        yield "checkpoint.export_at_end=false"
    yield "a run.dir on another disk"


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
