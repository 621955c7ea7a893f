"""How far a run has come, read from its folder: steps recorded, the newest whole checkpoint, and the work between.

Imports the standard library only: the supervisor of a cluster job reads this outside the environment that the ranks run
in.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_papo.files.small_files import STEP_NAME, read_object, read_records

STEPS_FILE = "steps.json"
"""In a run's folder where `train.epochs` is set: the number of steps that follow from it, and what it was asked for."""


@dataclass(frozen=True)
class RunProgress:
    steps_done: int
    """The last step recorded in metrics.jsonl, counted from 1; 0: none."""
    steps_saved: int
    """The step that a resumed run goes on with; 0: from the beginning."""
    saved_at: float
    """Unix time at which the last step in the checkpoint was done; 0: none, or not recorded."""
    written_at: float
    """Unix time of the checkpoint itself; 0: none."""

    @property
    def lost_steps(self) -> int:
        """How many recorded steps a resumed run does again."""
        return max(0, self.steps_done - self.steps_saved)

    def lost(self) -> str:
        """The lost work in words; empty when nothing is lost."""
        if not self.lost_steps:
            return ""
        return f"{self.lost_steps} step{'s' * (self.lost_steps > 1)} after it to be done again"


def read_progress(run_dir: Path) -> RunProgress:
    """Progress of the run in `run_dir`, which may be in any state, also empty."""
    records = [each for each in read_records(run_dir / "metrics.jsonl") if isinstance(each.get("step"), int)]
    done = records[-1]["step"] + 1 if records else 0
    saved, written_at = _newest_checkpoint(run_dir / "checkpoints")
    saved_at = [record.get("unix_time") for record in records if saved and record["step"] == saved - 1]
    times = [float(time) for time in saved_at if isinstance(time, (int, float))]
    return RunProgress(done, saved, times[-1] if times else 0.0, written_at)


def asked_length(settings: dict[str, Any]) -> list[Any]:
    """The settings, a whole tree of plain values, that the number of steps of a run follows from, as JSON has them."""
    train = settings["train"]
    data = {key: value for key, value in settings["data"].items() if not key.startswith("eval")}
    return [train["steps"], train.get("epochs"), train["prompts_per_step"], data]


def planned_steps(run_dir: Path, settings: dict[str, Any]) -> int | None:
    """The number of steps of the run in `run_dir` that `settings`, a whole tree, describe; None while it follows from
    epochs and the run has not opened its data yet."""
    train = settings["train"]
    if train.get("epochs") is None:
        return int(train["steps"])
    with suppress(ValueError):
        kept = read_object(run_dir / STEPS_FILE)
        if kept.get("asked") == asked_length(settings) and isinstance(kept.get("num_steps"), int):
            return int(kept["num_steps"])
    return None


def _newest_checkpoint(folder: Path) -> tuple[int, float]:
    """Steps and time of the checkpoint that was written last, as the store chooses it. One that is being removed, or
    whose state file is damaged, is skipped."""
    newest = (0, 0, 0.0)
    for path in folder.glob("step_*"):
        if STEP_NAME.fullmatch(path.name):
            with suppress(OSError, ValueError):
                state = read_object(path / "state.json")
                serial, step = state.get("serial"), state.get("step")
                if isinstance(serial, int) and isinstance(step, int):
                    newest = max(newest, (serial, step, (path / "state.json").stat().st_mtime))
    return newest[1], newest[2]
