"""A plugin of pytest that writes a line as each test begins and ends, and what such lines say.

    pytest -p benchmarks.gpu.stream      in the project's root, with STREAM_TO=FILE
    python -m benchmarks.gpu.stream FILE...

A run that is cut off leaves what it had found and which tests were running: pytest's own reports are written at its
end. The command prints that. With pytest-xdist the lines are the controller's.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

VARIABLE = "STREAM_TO"
"""The environment variable with the path of the file to which lines are appended."""
_MOST_LETTERS = 160
"""Number of letters of a reason that are shown."""


@dataclass
class Outcomes:
    """The results of a test run so far."""

    passed: dict[str, float] = field(default_factory=dict)
    """Seconds of each test that passed."""
    failed: dict[str, str] = field(default_factory=dict)
    """The reason of each test that failed."""
    skipped: dict[str, str] = field(default_factory=dict)
    running: list[str] = field(default_factory=list)

    def take(self, line: str) -> str | None:
        """A line of the file; which test it ended, if any."""
        event = json.loads(line)
        test, outcome = event["test"], event["outcome"]
        if outcome == "begun":
            self.running.append(test)
            return None
        if test in self.running:
            self.running.remove(test)
        if outcome == "passed":
            self.passed[test] = event["seconds"]
        else:
            getattr(self, outcome)[test] = event["reason"]
        return test

    def lines(self) -> Iterator[str]:
        numbers = ", ".join(f"{name} {len(getattr(self, name))}" for name in ("passed", "failed", "skipped"))
        yield numbers + (f"; cut off: {', '.join(self.running)}" if self.running else "")
        yield from (f"failed: {test}: {reason}" for test, reason in self.failed.items())


class _Writer:
    """A test's phases (setup, call, teardown) are one result: the first that did not pass, else that it passed."""

    def __init__(self, file: Path):
        self._file = file.open("a")
        self._begun: dict[str, list[Any]] = {}

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._begun[nodeid] = []
        self._write(nodeid, "begun")

    def pytest_runtest_logreport(self, report: Any) -> None:
        self._begun.setdefault(report.nodeid, []).append(report)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        phases = self._begun.pop(nodeid, [])
        bad = next((phase for phase in phases if not phase.passed), None)
        if bad is None:
            self._write(nodeid, "passed", seconds=sum(phase.duration for phase in phases))
        else:
            self._write(nodeid, bad.outcome, reason=_reason(bad))

    def pytest_collectreport(self, report: Any) -> None:
        """A file that cannot be imported has no tests."""
        if report.failed:
            self._write(report.nodeid, "failed", reason=_reason(report))

    def _write(self, test: str, outcome: str, **more: Any) -> None:
        self._file.write(json.dumps({"test": test, "outcome": outcome} | more) + "\n")
        self._file.flush()


def _reason(report: Any) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else crash.message if crash else report.longrepr
    lines = [line for line in str(text).splitlines() if line.strip()] or ["no message"]
    line = lines[0] if crash or report.skipped else lines[-1]  # of a traceback that is text, the last says what it was
    return line.removeprefix("Skipped: ").removeprefix("E  ").strip()[:_MOST_LETTERS]


def pytest_configure(config: Any) -> None:
    if VARIABLE in os.environ and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Writer(Path(os.environ[VARIABLE])), "stream-of-results")


def follow(file: TextIO, goes_on: Callable[[], bool], every_s: float = 0.2) -> Iterator[str]:
    """The lines of a file that another process writes, each once it is whole, for as long as `goes_on()`."""
    rest, going = "", True
    while going:
        going = goes_on()  # asked first: what is written until it is no more is still read
        *lines, rest = (rest + file.read()).split("\n")
        yield from lines
        time.sleep(every_s if going else 0.0)


def read(lines: Iterable[str]) -> Outcomes:
    outcomes = Outcomes()
    for line in lines:
        outcomes.take(line)
    return outcomes


if __name__ == "__main__":
    print("\n".join(line for name in sys.argv[1:] for line in read(Path(name).read_text().splitlines()).lines()))
