"""How far a run is, read from its folder. Standard library only, for the batch host's Python (3.9 or later).

`python3 -m megatron_papo.cluster.progress SETTINGS.json` says so and exits with 0 when the run is finished, else with 1:
the later jobs of a chain end at once on it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, Optional  # `X | None` is an error in Python 3.9 where it is evaluated

_TAIL = 1 << 16


def last_step(run_dir: Path) -> Optional[int]:  # noqa: UP007, UP045
    """Steps that metrics.jsonl has recorded, counted from 1; None before the first."""
    try:
        with open(run_dir / "metrics.jsonl", "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"]) + 1
        except (ValueError, KeyError, TypeError):  # half a line: at the end, of a killed run, or cut off at the front
            continue
    return None


def saved_step(run_dir: Path) -> Optional[int]:  # noqa: UP007, UP045
    """Steps in the newest whole checkpoint; None without one. Other names than `step_N` are not whole."""
    names = (path.name.partition("_")[2] for path in (run_dir / "checkpoints").glob("step_*"))
    steps = [int(name) for name in names if name.isdigit()]
    return max(steps) if steps else None


def is_finished(settings: dict[str, Any]) -> bool:
    """Whether the last step's checkpoint is there, and the exported folder where one is asked for.

    `settings`: the whole tree, as `papo check --json` prints it.
    """
    run_dir, checkpoint = Path(settings["run"]["dir"]), settings["checkpoint"]
    saved = saved_step(run_dir)
    exported = not checkpoint["export_at_end"] or (run_dir / "export").is_dir()
    return bool(checkpoint["resume"]) and saved is not None and saved >= settings["train"]["steps"] and exported


def main() -> int:
    settings = json.loads(Path(sys.argv[1]).read_text())
    if not is_finished(settings):
        return 1
    print(f"papo: {settings['run']['dir']}: finished already, {settings['train']['steps']} steps; nothing to do")
    return 0


if __name__ == "__main__":
    sys.exit(main())
