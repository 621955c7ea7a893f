"""What a stage of a step takes beside time: its peak memory; and on request a torch profiler's trace of a whole step.

Stages are named ranges of the trace. Leaves out who holds the memory: for that, torch has snapshots of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from megatron_papo.config import ObserveConfig
from megatron_papo.distributed.accelerator import has_gpu, peak_memory, reset_peak_memory
from megatron_papo.text.untrusted import as_text

named_range = torch.profiler.record_function
"""Names a block in the trace; costs microseconds when no trace is being written."""


class MeasuredMemory:
    """Peak bytes of each stage; a stage's peak is at least that of the stages within it."""

    def __init__(self) -> None:
        self._peaks: dict[str, int] = {}
        self._open: list[int] = []
        """What each open stage is known to have reached, outermost first."""
        self._readable = False

    @contextmanager
    def measured(self, name: str) -> Iterator[None]:
        """The block's peak counts for `name`; nothing does where the machine cannot tell."""
        self._note()  # for the stages around this one: the mark is about to be reset
        self._open.append(0)
        self._readable = reset_peak_memory()
        try:
            yield
        finally:
            self._note()
            peak = self._open.pop()
            if peak:
                self._peaks[name] = max(peak, self._peaks.get(name, 0))

    def take(self) -> dict[str, int]:
        """The peak bytes of each stage since the last call."""
        taken, self._peaks = self._peaks, {}
        return taken

    def _note(self) -> None:
        """The mark was last reset within every open stage, or as it began: what it shows is part of each."""
        if self._open and self._readable:
            peak = peak_memory()
            self._open = [max(reached, peak) for reached in self._open]


@contextmanager
def profiled(observe: ObserveConfig, run_dir: Path, rank: int, step: int) -> Iterator[None]:
    """Writes a Chrome trace of the block to RUN/profile/rank_N.json.gz when `step` is `observe.profile_step`.

    Warns if it cannot be written.
    """
    if step != observe.profile_step:
        yield
        return
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if has_gpu() else [])]
    with torch.profiler.profile(activities=activities) as profile:
        yield
    path = run_dir / "profile" / f"rank_{rank}.json.gz"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(path))
    except OSError as error:
        print(f"papo: warning: rank {rank}: no trace of step {step}: {as_text(error)}", file=sys.stderr, flush=True)
