"""Which tests of a session run on one worker of pytest-xdist, one after the other, and what took longest.

A group is most often a file, so that its shared fixtures are made once. All tests of Slurm are one group: they share a
cluster, count its jobs and crash its nodes. They wait more than they compute, so there is one worker more than cores.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import PurePosixPath
from typing import Any

SLURM = ("test_submit.py", "test_survive.py", "test_sweep.py", "test_convert.py")
APART = ("test_certify.py", "test_fp8_training.py", "test_ahead.py", "test_train_cases.py", "test_benchmark.py")
"""Each case of these files is a group of its own: they are long, and what they share is quickly made."""
LONGEST_FIRST = ("slurm", "test_gpu_check.py", "test_resume.py", "test_separate.py", *APART)
"""Groups that would otherwise be begun last and leave a core idle at the end."""
_SHOWN = 10


def group_of(nodeid: str) -> str:
    file = nodeid.partition("::")[0]
    name = PurePosixPath(file).name
    return "slurm" if name in SLURM else nodeid if name in APART else file


def place_of(nodeid: str) -> int:
    """Among the groups, lowest first."""
    group = group_of(nodeid)
    names = group, PurePosixPath(group.partition("::")[0]).name
    return next((place for place, name in enumerate(LONGEST_FIRST) if name in names), len(LONGEST_FIRST))


def scheduler(config: Any, log: Any) -> Any:
    """Hands out whole groups in the order in which they were collected."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    config.option.loadscopereorder = False
    return Groups(config, log)


def print_slowest(reporter: Any) -> None:
    """The slowest files, and the seconds of all: so that growth is seen. pytest's `--durations` has the cases."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for reports in reporter.stats.values():
        for report in reports:
            if hasattr(report, "duration") and hasattr(report, "nodeid"):
                seconds[report.nodeid.partition("::")[0]] += report.duration
    if len(seconds) < 2:
        return
    reporter.section(f"slowest files, of {sum(seconds.values()):.0f} s in all workers together")
    for file, value in sorted(seconds.items(), key=lambda each: -each[1])[:_SHOWN]:
        reporter.write_line(f"{value:7.1f} s  {file}")
