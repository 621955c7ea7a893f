"""How far a run has come, read from its folder: steps recorded, the newest whole checkpoint, and the work between.

Standard library alone: the supervisor of a cluster job reads this outside the environment that the ranks run in.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any


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
        """Recorded steps that a resumed run does again."""
        return max(0, self.steps_done - self.steps_saved)

    def lost(self) -> str:
        """In words; empty when nothing is."""
        if not self.lost_steps:
            return ""
        return f"{self.lost_steps} step{'s' * (self.lost_steps > 1)} after it to be done again"


def read_progress(run_dir: Path) -> RunProgress:
    """Of a run folder in any state, an empty one too."""
    records = list(_records(run_dir / "metrics.jsonl"))
    done = records[-1]["step"] + 1 if records else 0
    saved, written_at = _newest_checkpoint(run_dir / "checkpoints")
    saved_at = [record["unix_time"] for record in records if record["step"] == saved - 1]
    return RunProgress(done, saved, saved_at[-1] if saved_at else 0.0, written_at)


def _records(path: Path) -> list[dict[str, Any]]:
    """A last line that a crash cut short is left out."""
    found: list[dict[str, Any]] = []
    if not path.exists():
        return found
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
            found.append({"step": int(record["step"]), "unix_time": float(record.get("unix_time", 0.0))})
        except (ValueError, TypeError, KeyError, AttributeError):
            break
    return found


def _newest_checkpoint(folder: Path) -> tuple[int, float]:
    """Steps and time of the one written last, as the store chooses it; one that is being removed is passed over."""
    newest = (0, 0, 0.0)
    for path in sorted(folder.glob("step_*")):
        if path.suffix == "":
            with suppress(OSError, ValueError, TypeError, KeyError):
                state = json.loads((path / "state.json").read_text())
                newest = max(newest, (state["serial"], state["step"], (path / "state.json").stat().st_mtime))
    return newest[1], newest[2]
