"""Whether a job has nothing to do: its run is finished, or the job was asked to stop. Standard library only, for the
batch host's Python (3.9 or later).

`python3 -m megatron_papo.cluster.finished SETTINGS.json` says so and exits with 0 then, else with 1: the later jobs of
a chain end at once on it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from megatron_papo.cluster.stop_request import is_asked_to_stop
from megatron_papo.cluster.supervised_job import job_id
from megatron_papo.runtime.process import command
from megatron_papo.runtime.progress import planned_steps, read_progress
from megatron_papo.text.untrusted import as_text


def is_finished(settings: dict[str, Any]) -> bool:
    """Whether the last step's checkpoint is there, and the exported folder where one is asked for. Where nothing is
    saved (`checkpoint.contents=none`) the steps that the run recorded count instead.

    `settings`: the whole tree, as `papo check --json` prints it.
    """
    run_dir, checkpoint = Path(settings["run"]["dir"]), settings["checkpoint"]
    if not checkpoint["resume"]:
        return False
    exported = not checkpoint["export_at_end"] or (run_dir / "export").is_dir()
    steps, progress = planned_steps(run_dir, settings), read_progress(run_dir)
    done = progress.steps_done if checkpoint.get("contents") == "none" else progress.steps_saved
    return bool(exported and steps is not None and done >= steps)


def main() -> int:
    settings = json.loads(Path(sys.argv[1]).read_text())
    folder = Path(settings["run"]["dir"])
    run_dir = as_text(str(folder))
    if "SLURM_JOB_ID" in os.environ and is_asked_to_stop(folder, job_id(os.environ)):
        print(f"papo: {run_dir}: this job was asked to stop; `submit_slurm.py resume {run_dir}` goes on")
        return 0
    if not is_finished(settings):
        return 1
    print(f"papo: {run_dir}: finished already, {planned_steps(folder, settings)} steps; nothing to do")
    return 0


if __name__ == "__main__":
    sys.exit(command(main))
