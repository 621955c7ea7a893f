"""RUN/attempts.jsonl: what became of each attempt of a run under Slurm, and when failing again and again is enough.

A line when an attempt begins and one when it ends; a beginning without an end is an attempt whose supervisor was taken
away with its node. Imports the standard library only, as `supervise.py`, which writes it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_papo.files.small_files import append_record, made_of, read_records
from megatron_papo.runtime.progress import RunProgress

OUT_OF_MEMORY = "OutOfMemoryError"
"""Name of the failure of a rank that a GPU's memory, or its machine's, did not suffice for."""
FAILURES = ("failed", "lost")
"""Ends that count against a run. A run that saved, or that Slurm told to end, has not failed."""


@dataclass(frozen=True)
class Attempt:
    """One start of a run's ranks in a Slurm job."""

    number: int
    job: str
    nodes: str
    ranks: int
    began: float
    """Unix time of the beginning."""
    steps_done: int
    """Steps recorded when it began."""
    steps_saved: int
    """The step it goes on with."""
    lost_steps: int
    """Steps recorded by earlier attempts and done again by this one."""
    lost_seconds: float
    """Seconds that the attempt before had worked beyond its checkpoint."""
    end: str = ""
    """done, saved, told to end, refused, stopped (by its own settings), failed, or lost (its node crashed); empty while
    it runs."""
    ended: float = 0.0
    reached: int = 0
    """Steps recorded when it ended."""
    reason: str = ""
    failure: str = ""
    """Name of the failure that ended it, such as `OutOfMemoryError`."""


@dataclass(frozen=True)
class AttemptEnding:
    """How an attempt ended: one of the values of `Attempt.end`, the reason in a line, the rank and the failure's
    name."""

    end: str
    reason: str = ""
    rank: int | None = None
    failure: str = ""


def read_attempts(run_dir: Path) -> list[Attempt]:
    """The attempts of a run in their order; the newer line of an attempt counts. What a crash cut short or a disk
    spoilt is left out."""
    attempts = [made_of(Attempt, record) for record in read_records(run_dir / "attempts.jsonl")]
    return list({attempt.number: attempt for attempt in attempts if attempt is not None}.values())


def write_attempt(run_dir: Path, attempt: Attempt) -> None:
    append_record(run_dir / "attempts.jsonl", asdict(attempt))


def close_lost(run_dir: Path, attempts: list[Attempt], reached: int) -> list[Attempt]:
    """The attempts, an open last one ended as lost: nobody was left to say how it ended."""
    if not attempts or attempts[-1].end:
        return attempts
    last = replace(
        attempts[-1],
        end="lost",
        ended=_last_sign(run_dir, attempts[-1].began),
        reached=reached,
        reason="ended without a word: its first node crashed, or was taken away",
    )
    write_attempt(run_dir, last)
    return [*attempts[:-1], last]


def reason_to_stop(attempts: list[Attempt], max_failures: int) -> str:
    """Why going on makes no sense: the last `max_failures` attempts all failed at the same step, or memory did not
    suffice in the first step or again at the same; or nothing."""
    if reason := _out_of_memory_again(attempts):
        return reason
    last = attempts[-max_failures:]
    if len(last) < max_failures or any(attempt.end not in FAILURES for attempt in last):
        return ""
    if len({attempt.reached for attempt in last}) > 1:
        return ""
    reasons = "; ".join(dict.fromkeys(attempt.reason for attempt in last))
    times = "time" if max_failures == 1 else "times in a row"
    return f"failed {max_failures} {times} at step {last[-1].reached}, without progress: {reasons}"


def _out_of_memory_again(attempts: list[Attempt]) -> str:
    """The reason where another attempt would need as much memory at the same step; it takes no settings of its own."""
    last = attempts[-2:]
    if not last or last[-1].end != "failed" or last[-1].failure != OUT_OF_MEMORY:
        return ""
    step = last[-1].reached
    twice = len(last) == 2 and (last[0].end, last[0].failure, last[0].reached) == ("failed", OUT_OF_MEMORY, step)
    if step and not twice:
        return ""
    when = f"again at step {step}" if step else "in the first step"
    return f"out of memory {when}, as another attempt would be: {last[-1].reason}"


def _last_sign(run_dir: Path, began: float) -> float:
    """When any rank last gave a sign of life, in Unix time."""
    times = [path.stat().st_mtime for path in (run_dir / "heartbeats").glob("rank_*.json")]
    record = run_dir / "metrics.jsonl"
    return max([began, *times, *([record.stat().st_mtime] if record.exists() else [])])


def lost_seconds(earlier: list[Attempt], progress: RunProgress) -> float:
    """Seconds of work that the attempt before lost: from the last step that a checkpoint holds, or from its beginning,
    to its end."""
    if not earlier or earlier[-1].end == "saved":
        return 0.0
    return round(max(0.0, earlier[-1].ended - max(progress.saved_at, earlier[-1].began)), 1)


def is_chained(run_dir: Path, job: str) -> bool:
    """Whether `job` follows another one of the run by itself; one that a person submits counts failures anew."""
    lines = read_records(run_dir / "cluster" / "jobs.jsonl")
    return any(line.get("job") == job and line.get("chain_position") not in (None, 1) for line in lines)
