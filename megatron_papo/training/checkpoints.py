"""When a run saves or exports, and where it resumes.

With `checkpoint.asynchronous` a step waits only until its state has been copied. At most one checkpoint is being
written at a time: the next save waits for it. When a checkpoint fails there is one warning, counted as
`checkpoints_failed`, and the run goes on; when the last one fails, or one that is made because the run stops, the run
ends with the reason. With `checkpoint.contents=none` nothing is ever saved.
"""

from __future__ import annotations

import math
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_papo.checkpoint.state import Restored, TrainState
from megatron_papo.checkpoint.store import CheckpointStore
from megatron_papo.config import plain_tree
from megatron_papo.config.derived import model_folder
from megatron_papo.files.small_files import write_atomically
from megatron_papo.optimization.optimizer import Optimizer
from megatron_papo.runtime.failures import SAVED_EXIT, SAVED_FILE, AskedToStop
from megatron_papo.runtime.progress import read_progress
from megatron_papo.training.console import say, warn
from megatron_papo.training.exports import Exports
from megatron_papo.training.origin import Origin, carried_origin, changed_settings, compare_origins, data_changed
from megatron_papo.training.session import Run
from megatron_papo.weights.publishing import check_side_files


class Checkpoints:
    """The checkpoints under RUN/checkpoints, named by the number of steps that are done; all ranks call together.

    As a context it ends with `finish`; when the block failed, it only waits for the checkpoint that is being written.
    """

    def __init__(self, run: Run, optimizer: Optimizer, verb: str, origin: Origin):
        settings = run.config.checkpoint
        self.next_step = 0
        """The step to go on with, from 0: the one after the checkpoint that `resume` has loaded."""
        self.data_changed = False
        """Whether that checkpoint was drawn from other data, or in another order, than this run draws."""
        self._run, self._optimizer, self._verb, self._settings = run, optimizer, verb, settings
        self._origin = origin
        length = run.config.sft if verb == "sft" else run.config.train
        self._num_steps = length.num_steps
        self._length_key = f"{verb}.epochs (and {verb}.steps, if set)" if length.epochs else f"{verb}.steps"
        self._best = -math.inf
        self._said_wait = False
        self._exports = Exports(run)
        for reason in check_side_files(model_folder(run.config)):
            warn(run, reason)
        self._store = CheckpointStore(
            run.folder / "checkpoints", settings.keep_last, settings.keep_best, model_folder(run.config), self._warn
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.finish()
        elif self._store.busy:  # a failure is no reason to lose the state before it
            with self._run.clock.stage("save"), suppress(Exception):
                self._store.wait()

    def resume(self) -> dict[str, Any] | None:
        """Loads the newest whole checkpoint into policy, optimizer and schedule; the state saved with it, or None where
        there is none.

        Raises ValueError where the checkpoint was made by another verb, with other parts of the model frozen, from
        other data or another model, or where every checkpoint is damaged.
        """
        self._store.wait()
        if self._run.is_writer:
            (self._run.folder / SAVED_FILE).unlink(missing_ok=True)
        if not self._settings.resume:
            return None
        with self._run.clock.stage("resume"):
            newest = self._store.resume(self._state({}), self._check)
        if newest is None:
            return None
        folder, restored = newest
        best = self._store.best_metric()
        self._best = -math.inf if best is None else best
        self.next_step = restored.step
        self.data_changed = data_changed(restored.cursor, self._origin)
        self._origin = carried_origin(restored.cursor, self._origin, self._run.config)
        self._say_resumed(folder, restored)
        return restored.cursor

    def _say_resumed(self, folder: Path, restored: Restored) -> None:
        lost = read_progress(self._run.folder).lost() if self._run.is_writer else ""
        say(self._run, f"resumed from {folder}, step {restored.step}" + (f"; {lost}" if lost else ""))
        if restored.lacks_moments:
            warn(
                self._run, f"{folder} holds no optimizer state (checkpoint.contents=weights): Adam's moments begin anew"
            )
        if changed := changed_settings(restored.config, self._run.config):
            say(self._run, f"settings that are others than the checkpoint's: {changed}")
        if restored.step >= self._num_steps:
            say(
                self._run,
                f"all {self._num_steps} steps are done: nothing is left to train; a larger {self._length_key} would go "
                "on from here, another run.dir begins anew",
            )

    def is_due(self, step: int, num_steps: int, scores: dict[str, float] | None = None, *, now: bool = False) -> bool:
        """Whether `save_when_due` would save or export."""
        return self._saves(step, num_steps, scores, now) or self._exports.is_due(step)

    def _saves(self, step: int, num_steps: int, scores: dict[str, float] | None, now: bool) -> bool:
        if self._settings.contents == "none":
            return False
        done, every = step + 1, self._settings.save_every
        accuracy = (scores or {}).get("accuracy")
        best = self._settings.keep_best and accuracy is not None and accuracy > self._best
        return now or best or done == num_steps or (every > 0 and done % every == 0)

    def save_when_due(
        self,
        step: int,
        num_steps: int,
        state: dict[str, Any],
        scores: dict[str, float] | None = None,
        *,
        now: bool = False,
    ) -> None:
        """Saves after step `step` (from 0) where that is due: every `checkpoint.save_every` steps, after the last step,
        with `checkpoint.keep_best` when the held-out accuracy is the best so far, and with `now` in any case. Writes
        the Hugging Face folder of every `checkpoint.export_every` steps too.

        After the last step and with `now` the checkpoint is on disk when this returns, or SaveFailed is raised.
        """
        if self._saves(step, num_steps, scores, now):
            self._save(step, num_steps, state, scores, now)
        if self._exports.is_due(step):
            self._exports.write(step)

    def _save(
        self, step: int, num_steps: int, state: dict[str, Any], scores: dict[str, float] | None, now: bool
    ) -> None:
        done, accuracy = step + 1, (scores or {}).get("accuracy")
        if accuracy is not None:
            self._best = max(self._best, accuracy)
        with self._run.clock.stage("save"):
            self._wait_for_the_one_before(done)
            self._store.start(done, self._state(state), accuracy, background=self._settings.asynchronous)
        if now or done == num_steps:
            self.finish()

    def finish(self) -> None:
        """Waits for the checkpoint that is being written; raises SaveFailed (a ValueError) if the last one failed."""
        with self._run.clock.stage("save"):
            self._store.finish()

    def leave(self, step: int) -> int:
        """Ends a run that was asked to stop, once step `step` is saved; its exit code. The file RUN/saved tells a
        supervisor that the run can go on. Raises AskedToStop where the settings let nothing be saved: a supervisor must
        not begin the run anew."""
        if self._settings.contents == "none":
            raise AskedToStop(f"asked to stop after step {step + 1}; nothing is saved (checkpoint.contents=none)")
        if self._run.is_writer:
            write_atomically(self._run.folder / SAVED_FILE, f"{step + 1}\n")
        say(self._run, f"asked to stop: saved after step {step + 1}; the same command goes on from there")
        return SAVED_EXIT

    def export(self) -> None:
        """Writes the policy as the Hugging Face folder RUN/export, if `checkpoint.export_at_end`."""
        if not self._settings.export_at_end:
            return
        self.finish()
        if (newest := self._store.latest()) is not None:
            say(self._run, f"checkpoint: {newest}")
        self._exports.write_last()

    def _wait_for_the_one_before(self, done: int) -> None:
        """Waits until the checkpoint before that of step `done` is written; says once that this took time."""
        if not self._store.busy:
            self._store.wait()
            return
        start = time.monotonic()
        self._store.wait()
        if not self._said_wait:
            self._said_wait = True
            say(
                self._run,
                f"checkpoint of step {done} waited {time.monotonic() - start:.1f} s for the one before it to be "
                "written: saves come faster than the disk takes them (said once)",
            )

    def _warn(self, text: str) -> None:
        self._run.counts["checkpoints_failed"] = self._store.num_failed
        warn(self._run, text)

    def _state(self, cursor: dict[str, Any]) -> TrainState:
        cursor = {"verb": self._verb, "origin": dict(self._origin), **cursor}
        return TrainState(
            self._run.policy,
            self._run.shape,
            self._optimizer,
            cursor,
            plain_tree(self._run.config),
            saves_moments=self._settings.contents == "full",
        )

    def _check(self, folder: Path, saved: dict[str, Any]) -> None:
        """Raises ValueError where this run must not go on from the checkpoint `folder`, whose state file is `saved`."""
        verb = saved["cursor"].get("verb")
        if verb != self._verb:
            raise ValueError(
                f"run.dir: {folder} is a checkpoint of papo {verb}, this is papo {self._verb}; "
                "choose another run.dir, or checkpoint.resume=false"
            )
        before, now = saved["config"]["model"]["freeze"], self._run.config.model.freeze.model_dump()
        for part, frozen in now.items():
            if before[part] != frozen:
                raise ValueError(f"model.freeze.{part}: the checkpoint {folder} has {before[part]}, this run {frozen}")
        for text in compare_origins(folder, saved, self._origin, self._run.config):
            warn(self._run, text)
