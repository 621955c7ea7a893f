"""Runs the points of a sweep on this machine, one after the other: `papo train --ranks N`, for machines without Slurm.

RUN/cluster/local.log is what a run said, local.json its exit code.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence

from megatron_papo.cluster.submit import HOME, write
from megatron_papo.files.small_files import write_atomically
from megatron_papo.sweep.submit_points import CheckedPoints


def run_points(chosen: Sequence[CheckedPoints], say: Callable[[str], None]) -> None:
    """Runs the points. Interrupted, the running point is written down as such, and the rest is not begun."""
    for each in chosen:
        assert each.plan is not None
        say(f"{each.point.name}: {each.plan.checked}")
        code = _run(each)
        say(f"{each.point.name}: {'done' if code == 0 else f'exit code {code}'}")


def _run(checked: CheckedPoints) -> int:
    assert checked.plan is not None
    folder = write(checked.plan)
    (folder / "local.json").unlink(missing_ok=True)
    ranks = checked.plan.config.cluster.num_ranks
    words = ["-m", "megatron_papo", "train", str(folder / "settings.yaml"), f"--ranks={ranks}"]
    paths = [str(HOME), *filter(None, [os.environ.get("PYTHONPATH")])]  # as slurm/launch.sh has it
    code = 128 + 2
    with (folder / "local.log").open("a") as log:
        child = subprocess.Popen(
            [sys.executable, *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        )
        try:
            code = child.wait()
        except KeyboardInterrupt:
            child.terminate()  # in a terminal it heard the interrupt too
            child.wait()
            raise
        finally:
            write_atomically(folder / "local.json", json.dumps({"exit_code": code}) + "\n")
    return code
