"""The checkpoints of a run: one folder for each saved step, of which the last few and the best are kept.

A save is a snapshot, taken while training waits, and the writing of it, which a thread may do: every rank writes its
files, then rank 0 publishes the folder. Meanwhile the ranks communicate through a group of their own, on the CPU, which
never meets the collectives of training. At most one checkpoint is being written.

If a disk fails on any rank (full, over quota, broken, forbidden), that checkpoint is lost: every rank learns of it,
what was written of it is removed, and older ones stay. A checkpoint is whole or does not exist: its folder is written
under another name, forced to disk, then renamed (files/atomic_folder.py), so a process that is killed at any moment
leaves the last good one. What a killed process left behind is removed at the next save. Only folders that have the
names of a run's checkpoints and its own state.json are ever chosen or removed. A run whose newest checkpoint is damaged
resumes from the newest that is whole (`resume`). There is no time limit here: whoever waits for a write has one
(runtime/watchdog.py).
"""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist

from megatron_papo.checkpoint.box_writing import write_boxes, write_format
from megatron_papo.checkpoint.resume import Check, resume_newest
from megatron_papo.checkpoint.staging import Staging
from megatron_papo.checkpoint.state import (
    Restored,
    Snapshot,
    TrainState,
    snapshot,
    write_state_file,
)
from megatron_papo.checkpoint.survey import Survey, best_of, next_serial, survey
from megatron_papo.distributed.agreement import RanksFailed, fault_of, on_first_rank, read_on_first_rank
from megatron_papo.distributed.exchange import gather_objects
from megatron_papo.distributed.layout import layout
from megatron_papo.files.atomic_folder import publish, recover, remove
from megatron_papo.files.background import Background
from megatron_papo.files.small_files import STEP_NAME, make_way
from megatron_papo.weights.publishing import copy_side_files

_NEVER = datetime.timedelta(days=365)
"""A rank may wait for another's slow disk as long as it takes; one that died breaks the connection."""


class SaveFailed(ValueError):
    """A checkpoint that could not be written: its step, the ranks and their reasons, what is left to resume from."""


class CheckpointStore:
    """The checkpoints under `folder`; all ranks call its methods together.

    The `keep_last` newest ones are kept and, with `keep_best`, the one of the highest metric. Files of the Hugging Face
    folder `source` (config, tokenizer, processor) are copied into each, so that it can be used by itself. The thread
    that writes calls `warn` at once with a checkpoint that failed, and with whatever else goes wrong.
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
        """The number of checkpoints that could not be written."""
        self._warn = warn
        self._staging = Staging()
        self._group: dist.ProcessGroup | None = None
        self._writer = Background("checkpoint")
        self._failure: SaveFailed | None = None
        self._is_tight = False
        self._passed_over: set[Path] = set()
        """Damaged checkpoints that could not be renamed."""
        self._told: set[str] = set()

    def save(self, step: int, state: TrainState, metric: float | None = None) -> Path:
        """Writes `state` as `step_<step>` and returns that folder, which exists by then. A higher `metric` is better.

        An older checkpoint of the same step is replaced. Raises SaveFailed on every rank.
        """
        self.start(step, state, metric, background=False)
        self.finish()
        return self._final(step)

    def start(self, step: int, state: TrainState, metric: float | None = None, background: bool = True) -> None:
        """Saves as `save` does, but leaves it to `finish` to raise a failure. Waits for the checkpoint before.

        With `background` it returns once it has a copy of `state`, which a thread then writes.
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
        """Returns when nothing is being written; `finish` says whether that succeeded."""
        self._writer.wait()

    def finish(self) -> None:
        """Waits for what is being written; raises SaveFailed on every rank when the last save failed."""
        self.wait()
        if self._failure is not None:
            raise self._failure

    def resume(self, state: TrainState, check: Check = lambda folder, saved: None) -> tuple[Path, Restored] | None:
        """Fills `state` from the newest whole checkpoint and returns its folder; None when there is none.

        What happens to damaged checkpoints stands in resume.py.
        """
        resumed = resume_newest(self.folder, state, check, self._warn)
        if resumed is None:
            return None
        self._passed_over |= resumed.passed_over
        return resumed.folder, resumed.restored

    def latest(self) -> Path | None:
        """The newest checkpoint whose state file is whole, the same on every rank; None when there is none."""
        newest = read_on_first_rank(lambda: self._survey().newest())
        return newest and newest[0]

    def best_metric(self) -> float | None:
        """The highest metric among the checkpoints that were kept, the same on every rank; None when none has one."""
        best = read_on_first_rank(lambda: self._survey().best())
        return best and best[1]["metric"]

    def _attempt(self, step: int, taken: Snapshot, metric: float | None) -> None:
        """Writes and publishes. A disk's fault is stored as `_failure`; any other error is raised."""
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
            on_first_rank(group, lambda: self._prepare(partial))
            write_boxes(partial, taken.boxes, group)
            on_first_rank(group, lambda: self._publish(partial, final, taken, metric))
        except RanksFailed:
            if first:
                shutil.rmtree(partial, ignore_errors=True)
            raise

    def _prepare(self, partial: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        recover(self.folder, STEP_NAME, self._warn_once)
        make_way(partial, self._warn)
        partial.mkdir()

    def _publish(self, partial: Path, final: Path, taken: Snapshot, metric: float | None) -> None:
        """Makes what every rank has written a checkpoint, and removes older ones."""
        write_format(partial)
        if self.source is not None:
            copy_side_files(self.source, partial)
        write_state_file(partial, **taken.facts, metric=metric, serial=next_serial(self.folder))
        publish(partial, final, self._warn)
        self._passed_over.discard(final)
        self._retire()
        try:
            self._look_ahead(final)
        except OSError as error:
            self._warn_once(f"the room for the next checkpoint is not known: {fault_of(0, error).reason}")

    def _look_ahead(self, last: Path) -> None:
        """Warns once if the next checkpoint will not fit the free space of the file system; a quota may be tighter."""
        size = sum(file.stat().st_size for file in last.iterdir())
        free = shutil.disk_usage(last).free
        if free < size and not self._is_tight:
            self._warn(f"{last} takes {size / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free: too little for the next one")
        self._is_tight = free < size

    def _final(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def _remains(self) -> str:
        """A sentence on what there is to resume from, as rank 0 sees it; all ranks call it together."""
        assert self._group is not None
        steps = []
        if layout().rank == 0:
            with suppress(OSError):
                steps = [state["step"] for _, state in self._survey().whole]
        (steps, *_) = gather_objects(steps, self._group)
        return f"the last good one is step {steps[-1]}" if steps else "there is no earlier one"

    def _survey(self) -> Survey:
        return survey(self.folder, self._passed_over)

    def _retire(self) -> None:
        """Removes the checkpoints that are not kept. Links belong to somebody else: they are neither counted nor
        removed."""
        whole = [listed for listed in self._survey().whole if not listed[0].is_symlink()]
        keep = {path for path, _ in whole[-self.keep_last :]}
        if self.keep_best and (best := best_of(whole)) is not None:
            keep.add(best[0])
        for path, _ in whole:
            if path not in keep:
                try:
                    remove(path, self._warn)
                except OSError as error:
                    self._warn_once(f"older checkpoints could not be removed: {fault_of(0, error).reason}")

    def _warn_once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self._warn(text)
