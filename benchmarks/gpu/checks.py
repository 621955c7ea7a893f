"""The tests of the GPU paths (`pytest tests/gpu`): each that failed is a row as it ends, then how many passed.

Where there is a GPU, several share it (pytest-xdist, where that is installed); those of vLLM's sleep weigh the card's
free memory and have it to themselves, after the others, and are left out where it is to be quick. Past the part's limit
the tests are ended, what they had found is counted, and those that were running are named. pytest's own output goes to
stderr.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.gpu.apart import Rows, end_with_parent
from benchmarks.gpu.rows import GpuRow, Options, not_measured
from benchmarks.gpu.stream import VARIABLE, Outcomes, follow
from megatron_papo.distributed.accelerator import has_gpu

ROOT = Path(__file__).resolve().parents[2]
FAILED_TESTS = "pytest tests/gpu: failed"
AT_A_TIME = 6
ALONE = "tests/gpu/test_sleep*.py"
_GRACE_S = 5.0
"""Before the part's own limit the tests are ended: the rows are still to be written."""


def run(options: Options) -> Iterator[GpuRow]:
    if importlib.util.find_spec("pytest") is None:
        yield not_measured("pytest tests/gpu", "pytest is not installed")
        return
    ends_at = float("inf") if options.ends_at is None else options.ends_at - _GRACE_S
    outcomes, output = Outcomes(), []
    for arguments in _calls(options.quick):
        output = yield from results(arguments, outcomes, lambda: time.monotonic() >= ends_at)
    if not (outcomes.passed or outcomes.failed or outcomes.skipped or outcomes.running):
        raise RuntimeError(f"pytest found no tests: {output[-1] if output else 'no output'}")
    yield from counts(outcomes)


def _calls(quick: bool) -> Iterator[list[str]]:
    if not has_gpu():
        yield ["tests/gpu"]
        return
    workers = min(AT_A_TIME, os.cpu_count() or 1)
    several = ["-n", str(workers)] if importlib.util.find_spec("xdist") else []
    yield ["tests/gpu", f"--ignore-glob={ROOT / ALONE}", *several]
    alone = sorted(str(file.relative_to(ROOT)) for file in ROOT.glob(ALONE))
    if alone and not quick:
        yield alone


def results(arguments: Sequence[str], outcomes: Outcomes, is_over: Callable[[], bool]) -> Rows:
    """Runs these tests until `is_over()`, adds to `outcomes`, and yields failures as they come; returns pytest's last
    line."""
    with TemporaryDirectory() as folder:
        stream, log = Path(folder, "stream.jsonl"), Path(folder, "log")
        stream.touch()
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "benchmarks.gpu.stream"]
        environ = os.environ | {VARIABLE: str(stream)}
        with log.open("w") as out, stream.open() as lines:
            process = subprocess.Popen(
                [*command, *arguments], cwd=ROOT, env=environ, stdout=out, stderr=out, preexec_fn=end_with_parent
            )
            for line in follow(lines, lambda: process.poll() is None and not is_over()):
                test = outcomes.take(line)
                if test in outcomes.failed:
                    yield not_measured(test, f"failed: {outcomes.failed[test]}")
            process.kill()
            process.wait()
        text = log.read_text(errors="replace")
    print(text, file=sys.stderr)
    return text.strip().splitlines()[-1:]


def counts(outcomes: Outcomes) -> Iterator[GpuRow]:
    yield GpuRow("pytest tests/gpu: passed", float(len(outcomes.passed)), "tests")
    yield GpuRow(FAILED_TESTS, float(len(outcomes.failed)), "tests")
    yield GpuRow("pytest tests/gpu: skipped", float(len(outcomes.skipped)), "tests")
    if outcomes.passed:
        test = max(outcomes.passed, key=lambda name: outcomes.passed[name])
        yield GpuRow(f"the longest: {test}", outcomes.passed[test], "s")
    for test in outcomes.running:
        yield not_measured(test, "cut off: the time was over")
