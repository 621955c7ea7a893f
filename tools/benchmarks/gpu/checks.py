"""The tests of the GPU paths (`pytest tests/gpu`), counted; each that failed is a row with its reason."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from tools.benchmarks.gpu.rows import GpuRow, Options, not_measured

ROOT = Path(__file__).resolve().parents[3]
FAILED_TESTS = "pytest tests/gpu: failed"
_LIMIT_S = 510.0


def run(options: Options) -> Iterator[GpuRow]:
    del options
    if importlib.util.find_spec("pytest") is None:
        yield not_measured("pytest tests/gpu", "pytest is not installed")
        return
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "tests/gpu", f"--junitxml={report}", "-p", "no:cacheprovider"]
        done = subprocess.run(command, cwd=ROOT, timeout=_LIMIT_S, capture_output=True, text=True)
        if not report.exists():
            last = (done.stdout + done.stderr).strip().splitlines()[-1:] or ["no output"]
            raise RuntimeError(f"pytest ended with {done.returncode}: {last[0]}")
        yield from rows_of(ElementTree.parse(report).getroot())


def rows_of(report: ElementTree.Element) -> Iterator[GpuRow]:
    """Of pytest's JUnit report: how many passed, failed and were skipped; the failures."""
    cases = list(report.iter("testcase"))
    failures = [(case, found) for case in cases for found in case if found.tag in ("failure", "error")]
    num_failed = len({id(case) for case, _ in failures})
    num_skipped = sum(any(found.tag == "skipped" for found in case) for case in cases)
    yield GpuRow("pytest tests/gpu: passed", float(len(cases) - num_failed - num_skipped), "tests")
    yield GpuRow(FAILED_TESTS, float(num_failed), "tests")
    yield GpuRow("pytest tests/gpu: skipped", float(num_skipped), "tests")
    for case, found in failures:
        lines = (found.get("message") or "").strip().splitlines() or ["no message"]
        yield not_measured(f"{case.get('classname')}::{case.get('name')}", f"{found.tag}: {lines[0]}"[:200])
