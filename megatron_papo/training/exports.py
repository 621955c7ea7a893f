"""The Hugging Face folders that a run writes of its policy: RUN/export at the end, RUN/exports/step_<step> on the way.

A folder on the way that a disk does not take costs a warning, counted as `exports_failed`, and not the run; the one at
the end is what the run was made for, so its failure is the run's.
"""

from __future__ import annotations

import time
from pathlib import Path

from megatron_papo.config.derived import model_folder
from megatron_papo.distributed.agreement import InputFailed
from megatron_papo.files.atomic_folder import recover, remove
from megatron_papo.files.small_files import STEP_NAME
from megatron_papo.training.console import say, warn
from megatron_papo.training.session import Run
from megatron_papo.weights.transfer import write_hf


class Exports:
    """The Hugging Face folders of one run; all ranks call its methods together."""

    def __init__(self, run: Run) -> None:
        self._run, self._settings = run, run.config.checkpoint
        if self._settings.export_every:
            run.counts["exports_failed"] = 0

    def is_due(self, step: int) -> bool:
        """Whether `checkpoint.export_every` asks for a folder after step `step` (from 0)."""
        every = self._settings.export_every
        return every > 0 and (step + 1) % every == 0

    def write(self, step: int) -> None:
        """Writes RUN/exports/step_<step + 1>, and removes the oldest beyond `checkpoint.keep_exports`."""
        run, started = self._run, time.monotonic()
        folder = run.folder / "exports" / f"step_{step + 1:08d}"
        with run.clock.stage("export"):
            try:
                write_hf(run.policy, run.shape, folder, model_folder(run.config))
            except InputFailed as failed:
                run.counts["exports_failed"] += 1
                warn(run, f"the Hugging Face folder of step {step + 1} was not written: {failed}")
                return
            self._retire(folder.parent)
        say(run, f"Hugging Face folder after step {step + 1}: {folder}, in {time.monotonic() - started:.1f} s")

    def write_last(self) -> None:
        """Writes RUN/export. Raises InputFailed, a ValueError, where the disk does not take it."""
        run = self._run
        folder = run.folder / "export"
        with run.clock.stage("export"):
            write_hf(run.policy, run.shape, folder, model_folder(run.config))
        say(run, f"Hugging Face folder: {folder}")

    def _retire(self, parent: Path) -> None:
        """Removes, on the rank that writes, the folders that are not kept."""
        keep, run = self._settings.keep_exports, self._run
        if keep is None or not run.is_writer:
            return
        try:
            recover(parent, STEP_NAME, lambda text: warn(run, text))
            folders = sorted(path for path in parent.iterdir() if STEP_NAME.fullmatch(path.name) and path.is_dir())
            for path in folders[:-keep]:
                remove(path, lambda text: warn(run, text))
        except OSError as error:
            warn(run, f"older Hugging Face folders could not be removed: {error.strerror}: {error.filename}")
