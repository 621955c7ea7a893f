"""A grader at arm's length: starts `math_worker` on first use and never waits for it longer than the limit.

math-verify raises outside the main thread, hangs on towers of powers and can take all memory, and mathruler evaluates
what it is given as Python; here none of that reaches the trainer. The worker is a fresh Python, not a fork: a process
that holds torch and gloo threads must not fork. Verdicts are remembered, since the samples of a group often agree.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Literal

from megatron_papo.runtime.process import save_requests_blocked

_START_S = 120.0
"""Importing sympy on a busy machine."""
_SHARE = 0.95
"""Share of the time limit for the comparison itself; the rest is for ending it and handing over the next one."""
_GRACE_S = 10.0
"""Beyond the limit of a comparison, which the worker keeps by itself, before the worker too is given up."""
_REMEMBERED = 100_000
_MAX_GOLD = 1000
_MOST_REPLIED = 100
"""Bytes of a reply."""


class Verifier:
    """A context manager; `equal` may be called from any thread of one process, one call at a time."""

    def __init__(self, timeout_s: float, grader: Literal["math-verify", "mathruler"] = "math-verify") -> None:
        self._timeout_s = timeout_s
        self._grader = grader
        self._worker: subprocess.Popen[bytes] | None = None
        self._verdicts: dict[tuple[str, str], bool] = {}

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def equal(self, answer: str, gold: str) -> bool:
        """Whether the grader calls the two equal; False when it did not know in time."""
        if len(gold) > _MAX_GOLD:
            return False
        key = (answer, gold)
        if key not in self._verdicts:
            self._verdicts[key] = self._ask(json.dumps([answer, gold])) == "true"
            if len(self._verdicts) > _REMEMBERED:
                del self._verdicts[next(iter(self._verdicts))]
        return self._verdicts[key]

    def close(self) -> None:
        """Ends the worker, if one runs."""
        if self._worker is not None:
            self._worker.kill()
            self._worker.communicate()
            self._worker = None

    def _ask(self, line: str) -> str | None:
        worker = self._running()
        assert worker.stdin is not None
        try:
            worker.stdin.write(line.encode() + b"\n")
            worker.stdin.flush()
            reply = read_line(worker, self._timeout_s + _GRACE_S)
        except BrokenPipeError:
            reply = None
        if reply is None:
            self.close()
        return reply

    def _running(self) -> subprocess.Popen[bytes]:
        if self._worker is not None and self._worker.poll() is not None:
            self.close()
        if self._worker is None:
            script = Path(__file__).with_name("math_worker.py")
            command = [sys.executable, "-P", str(script), str(_SHARE * self._timeout_s), self._grader]
            with save_requests_blocked():  # which are the trainer's, and would end the worker
                self._worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            if read_line(self._worker, _START_S) != "ready":
                self.close()
                raise RuntimeError(f"the worker of {self._grader} did not start; its own message stands above")
        return self._worker


def read_line(worker: subprocess.Popen[bytes], timeout_s: float) -> str | None:
    """A line of the worker; None when it ended, said no line or took longer. It has read answers, so it is not trusted
    to say whole lines, or words."""
    assert worker.stdout is not None
    line, deadline = b"", time.monotonic() + timeout_s
    with selectors.DefaultSelector() as selector:
        selector.register(worker.stdout, selectors.EVENT_READ)
        while not line.endswith(b"\n"):
            in_time = selector.select(max(0.0, deadline - time.monotonic()))
            part = os.read(worker.stdout.fileno(), _MOST_REPLIED) if in_time else b""
            if not part or len(line) > _MOST_REPLIED:
                return None
            line += part
    return line.decode(errors="replace").strip() or None
