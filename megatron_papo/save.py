"""When a run saves, where it resumes, and the Hugging Face folder it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_papo.checkpoint.huggingface import write_hf
from megatron_papo.checkpoint.state import TrainState
from megatron_papo.checkpoint.store import CheckpointStore
from megatron_papo.optim import Optimizer
from megatron_papo.record import say
from megatron_papo.run import Run, model_folder


class Checkpoints:
    """The checkpoints under RUN/checkpoints, named by the steps that are done; all ranks call together."""

    def __init__(self, run: Run, optimizer: Optimizer):
        settings = run.config.checkpoint
        self.next_step = 0
        """The step to go on with: 0, or after what `resume` found."""
        self._run, self._optimizer, self._settings = run, optimizer, settings
        self._store = CheckpointStore(
            run.folder / "checkpoints", settings.keep_last, settings.keep_best, source=model_folder(run.config)
        )

    def resume(self) -> dict[str, Any] | None:
        """Loads the newest whole checkpoint into policy, optimizer and schedule; the state saved with it."""
        latest = self._store.latest() if self._settings.resume else None
        if latest is None:
            return None
        with self._run.clock.stage("resume"):
            restored = self._store.load(latest, self._state({}))
        self.next_step = restored.step
        say(self._run, f"resumed from {latest}, step {restored.step}")
        return restored.cursor

    def save_when_due(
        self,
        step: int,
        num_steps: int,
        state: dict[str, Any],
        scores: dict[str, float] | None = None,
        *,
        now: bool = False,
    ) -> None:
        """After step `step` (from 0): every `checkpoint.save_every` steps, after the last one, and with `now`."""
        done, every = step + 1, self._settings.save_every
        if not (now or done == num_steps or (every and done % every == 0)):
            return
        with self._run.clock.stage("save"):
            self._store.save(done, self._state(state), metric=(scores or {}).get("accuracy"))

    def export(self) -> Path | None:
        """The policy as a Hugging Face folder RUN/export, when `checkpoint.export_at_end`."""
        if not self._settings.export_at_end:
            return None
        folder = self._run.folder / "export"
        with self._run.clock.stage("export"):
            write_hf(self._run.policy.module, self._run.shape, folder, model_folder(self._run.config))
        say(self._run, f"checkpoint: {self._store.latest()}")
        say(self._run, f"Hugging Face folder: {folder}")
        return folder

    def _state(self, cursor: dict[str, Any]) -> TrainState:
        config = json.loads(self._run.config.model_dump_json())
        return TrainState(self._run.policy.module, self._run.shape, self._optimizer, cursor, config)
