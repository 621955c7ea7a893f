"""The lines that a supervised job prints: its own, the ranks' output, and how an attempt begins and ends.

Imports the standard library only, for Python 3.9 and later, as `supervise.py`.
"""

from __future__ import annotations

from pathlib import Path

from megatron_papo.cluster.attempts import Attempt
from megatron_papo.text.untrusted import LINES, as_text

_TAIL_LINES = 25


def say(text: str) -> None:
    """Prints one line of the supervisor's own."""
    show(f"papo: {text}\n")


def show(text: str) -> None:
    """Prints text of the ranks. Whoever reads the job's log reads it on a terminal, and a rank's output holds what a
    model or a row says."""
    print(as_text(text, LINES + "\r"), end="", flush=True)


def last_lines(path: Path) -> list[str]:
    """The last lines of a rank's log; none where there is no such file."""
    return path.read_text(errors="replace").splitlines()[-_TAIL_LINES:] if path.exists() else []


def opening(attempt: Attempt, earlier: list[Attempt], lost: str) -> str:
    """How an attempt begins, in one line. `lost`: the steps that have to be done again."""
    text = f"attempt {attempt.number} (job {attempt.job} on {attempt.nodes}, {attempt.ranks} ranks): "
    text += f"goes on after step {attempt.steps_saved}" if attempt.steps_saved else "starts"
    if lost:
        text += f", {lost}"
    if earlier:
        stood_s = attempt.began - earlier[-1].ended
        text += f"; {attempt.lost_seconds:.0f} s of work lost, stood still for {stood_s:.0f} s"
    return text


def closing(attempt: Attempt, reason: str) -> str:
    """How an attempt ended, in one line."""
    text = f"attempt {attempt.number}: {attempt.end} after {attempt.ended - attempt.began:.0f} s, "
    return text + f"{attempt.reached} steps done" + (f": {reason.removeprefix('papo: ')}" if reason else "")
