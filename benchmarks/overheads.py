"""What a command costs before it does anything, and what a report of progress costs within a stage.

A command's start is compared with that of an interpreter that does nothing: processor seconds of its process and all
that it started. `import megatron_papo.train` is what every rank of a run pays. A report of progress is compared with an
empty call of Python's.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.rows import Row
from benchmarks.timing import measure
from megatron_papo.config import RunConfig
from megatron_papo.observe.clock import StageClock

ROOT = Path(__file__).resolve().parents[1]
NOTHING = "python, nothing"
COMMANDS = {
    "papo --help": ("-m", "megatron_papo", "--help"),
    "papo train --dry-run": ("-m", "megatron_papo", "train", "--dry-run"),
    "convert_checkpoint.py --help": (str(ROOT / "tools" / "convert_checkpoint.py"), "--help"),
    "import megatron_papo.train": ("-c", "import megatron_papo.train"),
}
REPORTS = 10_000


def run(quick: bool, *, rounds: int | None) -> list[Row]:
    rounds = rounds or (1 if quick else 5)
    sides = {NOTHING: ("-c", "pass"), **COMMANDS}
    seconds = measure({name: partial(_start, words) for name, words in sides.items()}, rounds, "start", _of_children)
    rows = [
        Row(f"{name} / {NOTHING}", seconds.median(name), seconds.median(NOTHING), seconds.ratio(name, NOTHING), "s")
        for name in COMMANDS
    ]
    return [*rows, _reports(rounds)]


def _start(words: tuple[str, ...]) -> None:
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"python {' '.join(words)} ended with {done.returncode}: {done.stderr[-300:]}")


def _of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _reports(rounds: int) -> Row:
    with TemporaryDirectory() as folder:
        clock = StageClock(RunConfig(dir=Path(folder)), rank=0, console=False)
        with clock.stage("pack") as progress:
            sides = {"ours": partial(_repeat, progress.advance), "empty": partial(_repeat, _nothing)}
            seconds = measure(sides, rounds, "reports", time.process_time)
    ours, empty = (1e6 * seconds.median(side) / REPORTS for side in ("ours", "empty"))
    return Row("a report of progress / an empty call", ours, empty, seconds.ratio("ours", "empty"), "us")


def _repeat(call: object) -> None:
    assert callable(call)
    for _ in range(REPORTS):
        call()


def _nothing() -> None:
    pass
