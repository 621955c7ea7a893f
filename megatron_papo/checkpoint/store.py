"""The checkpoints of a run: a folder a step, the last few and the best kept; whole or not there at all.

A save is a snapshot, taken while training waits, and the writing of it, which may be left to a thread: files of every
rank, then rank 0 publishes them. What the ranks have to tell each other meanwhile goes through a group of its own, on
the CPU, so it never meets the collectives of training. At most one checkpoint is being written.

A disk's fault on any rank (full, over quota, broken, forbidden) costs that checkpoint: every rank learns of it, what
was written of it is removed, and older ones stay. A process killed at any moment leaves the last good checkpoint: a
folder is written under another name, forced to disk, then renamed (atomic.py). What a killed process left behind is
cleared at the next save. Leaves out a time limit: who waits for a write has one (observe/watchdog.py).
"""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_papo.checkpoint.atomic import publish, recover, remove
from megatron_papo.checkpoint.background import Background
from megatron_papo.checkpoint.faults import RanksFailed, fault_of, together
from megatron_papo.checkpoint.folders import copy_side_files
from megatron_papo.checkpoint.staging import Staging
from megatron_papo.checkpoint.state import (
    Restored,
    Snapshot,
    TrainState,
    is_checkpoint,
    read_state,
    read_state_file,
    snapshot,
    write_state_file,
)
from megatron_papo.checkpoint.writing import write_boxes, write_format
from megatron_papo.parallel import gather_objects, layout

_PATTERN = "step_*"
_NEVER = datetime.timedelta(days=365)
"""A rank may wait for another's slow disk as long as it takes; one that died breaks the connection."""


class SaveFailed(ValueError):
    """A checkpoint that could not be written: its step, the ranks and their reasons, what is left to resume from."""


class CheckpointStore:
    """Checkpoints under `folder`, all ranks calling together.

    `keep_last` newest ones stay and, with `keep_best`, the one of the highest metric. Files of the Hugging Face folder
    `source` (config, tokenizer, processor) go into each, so that it can be used alone. `warn` is told at once
    of a checkpoint that failed, and of what else goes wrong, by the thread that writes.
    """

    def __init__(
        self,
        folder: Path | str,
        keep_last: int = 2,
        keep_best: bool = True,
        source: Path | str | None = None,
        warn: Callable[[str], None] = lambda text: None,
    ):
        self.folder = Path(folder)
        self.keep_last = keep_last
        self.keep_best = keep_best
        self.source = None if source is None else Path(source)
        self.num_failed = 0
        """Checkpoints that could not be written."""
        self._warn = warn
        self._staging = Staging()
        self._group: dist.ProcessGroup | None = None
        self._writer = Background("checkpoint")
        self._failure: SaveFailed | None = None
        self._is_tight = False

    def save(self, step: int, state: TrainState, metric: float | None = None) -> Path:
        """Writes `state` as `step_<step>` and returns that folder, which exists on return. `metric`: higher is better.

        An older checkpoint of the same step is replaced. Raises SaveFailed on every rank.
        """
        self.start(step, state, metric, background=False)
        self.finish()
        return self._final(step)

    def start(self, step: int, state: TrainState, metric: float | None = None, background: bool = True) -> None:
        """As `save`, but a failure is kept for `finish`. In the background: returns once it has a copy of `state`.

        Waits for the checkpoint before.
        """
        self.wait()
        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=_NEVER)
        taken = snapshot(step, state, self._staging if background else None)
        if background:
            self._writer.start(lambda: self._attempt(step, taken, metric))
        else:
            self._attempt(step, taken, metric)

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._writer.busy

    def wait(self) -> None:
        """Until nothing is being written; whether it succeeded is `finish`'s to say."""
        self._writer.wait()

    def finish(self) -> None:
        """Waits for what is being written; raises SaveFailed on every rank when the last save failed."""
        self.wait()
        if self._failure is not None:
            raise self._failure

    def load(self, path: Path | str, state: TrainState) -> Restored:
        """Fills `state` from the checkpoint at `path`, whatever layout wrote it. Raises ValueError as `read_state`."""
        return read_state(path, state)

    def latest(self) -> Path | None:
        """The newest whole checkpoint, the same on every rank; None when there is none."""
        return self._agreed(lambda found: found[-1][0] if found else None)

    def best(self) -> Path | None:
        """The checkpoint of the highest metric among those kept; the newest of equals."""
        return self._agreed(lambda found: _best(found))

    def _attempt(self, step: int, taken: Snapshot, metric: float | None) -> None:
        """Writes and publishes; `_failure` says what a disk is to blame for. Raises what no disk is."""
        self._failure = None
        try:
            self._write(step, taken, metric)
        except RanksFailed as error:
            if error.is_bug:
                raise
            self.num_failed += 1
            self._failure = SaveFailed(f"checkpoint of step {step} was not saved: {error}; {self._remains()}")
            self._warn(str(self._failure))

    def _write(self, step: int, taken: Snapshot, metric: float | None) -> None:
        final, group, first = self._final(step), self._group, layout().rank == 0
        assert group is not None
        partial = final.with_name(f"{final.name}.tmp")
        try:
            together(group, (lambda: self._prepare(partial)) if first else None)
            write_boxes(partial, taken.boxes, group)
            together(group, (lambda: self._publish(partial, final, taken, metric)) if first else None)
        except RanksFailed:
            if first:
                shutil.rmtree(partial, ignore_errors=True)
            raise

    def _prepare(self, partial: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        recover(self.folder, _PATTERN)
        partial.mkdir()

    def _publish(self, partial: Path, final: Path, taken: Snapshot, metric: float | None) -> None:
        """What every rank has written becomes a checkpoint, and older ones make room."""
        write_format(partial)
        if self.source is not None:
            copy_side_files(self.source, partial)
        write_state_file(partial, **taken.facts, metric=metric, serial=self._next_serial())
        publish(partial, final)
        try:
            self._retire()
            self._look_ahead(final)
        except OSError as error:
            self._warn(f"older checkpoints could not be removed: {fault_of(0, error).reason}")

    def _look_ahead(self, last: Path) -> None:
        """Says, once, that the next checkpoint will not fit: the room is the file system's, quotas may be tighter."""
        size = sum(file.stat().st_size for file in last.iterdir())
        free = shutil.disk_usage(last).free
        if free < size and not self._is_tight:
            self._warn(f"{last} takes {size / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free: too little for the next one")
        self._is_tight = free < size

    def _final(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def _remains(self) -> str:
        """What there is to resume from, as rank 0 sees it; ranks call it together."""
        assert self._group is not None
        steps = []
        if layout().rank == 0:
            with suppress(OSError, ValueError):
                steps = [state["step"] for _, state in self._whole()]
        (steps, *_) = gather_objects(steps, self._group)
        return f"the last good one is step {steps[-1]}" if steps else "there is no earlier one"

    def _agreed(self, choose: Any) -> Path | None:
        """Rank 0 looks, and every rank hears: another node's view of a shared disk may lag."""
        if not dist.is_initialized():
            return choose(self._whole())
        choice = [choose(self._whole()) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(choice, src=0)
        return choice[0]

    def _whole(self) -> list[tuple[Path, dict[str, Any]]]:
        """Whole checkpoints with their state files, in the order they were written."""
        found = []
        for path in self.folder.glob(_PATTERN):
            waiting = path.suffix == ".old" and not path.with_suffix("").exists()  # killed while being replaced
            if (path.suffix == "" or waiting) and is_checkpoint(path):
                found.append((path, read_state_file(path)))
        return sorted(found, key=lambda item: item[1]["serial"])

    def _next_serial(self) -> int:
        """Steps do not order checkpoints when a run starts afresh in an old folder; this does."""
        return max((state["serial"] for _, state in self._whole()), default=0) + 1

    def _retire(self) -> None:
        found = self._whole()
        keep = {path for path, _ in found[-self.keep_last :]}
        if self.keep_best and (best := _best(found)) is not None:
            keep.add(best)
        for path, _ in found:
            if path not in keep:
                remove(path)


def _best(found: list[tuple[Path, dict[str, Any]]]) -> Path | None:
    rated = [(path, state) for path, state in found if state.get("metric") is not None]
    return max(rated, key=lambda item: (item[1]["metric"], item[1]["serial"]))[0] if rated else None
