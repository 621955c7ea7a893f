"""What a part of the GPU check reports: a figure beside what it is compared with, or why there is none."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

GIB = 2**30
NEEDS_GPU = "needs a GPU"
_MOST_LETTERS = 200
"""Number of letters of a reason that are shown."""
_FRAMES = 8
"""Number of innermost frames of a failure's traceback that are shown."""
_LITTLE_GIB = 0.5


SHAPES = {"3b": "Qwen2.5-VL-3B", "4b": "Qwen3-VL-4B", "tiny": "qwen2_5_vl", "tiny-qwen3": "qwen3_vl"}
"""What `--shape` says: a published model, or the other benchmarks' small one of a family."""


class Failed(Exception):
    """A failure whose message is all of a row's reason."""


@dataclass(frozen=True)
class Options:
    shape: str
    """Of the model: a key of `SHAPES`."""
    quick: bool = False
    """Whether sizes are small and few, to see that it runs."""
    rounds: int = 5
    """How often every side is measured, in turns."""
    recompute: str | None = None
    """A value of `model.recompute`, which is then the only one measured; None: the benchmark looks for what fits."""
    ends_at: float | None = None
    """The time at which the part will be ended, by time.monotonic."""

    @property
    def tiny(self) -> bool:
        """Whether the model is a small one, which needs no GPU."""
        return self.shape.startswith("tiny")


@dataclass(frozen=True)
class GpuRow:
    name: str
    value: float | None
    """The figure in `unit`; None: it was not measured, and `note` says why."""
    unit: str = ""
    baseline: float | None = None
    """What it is compared with, in `unit`."""
    ratio: float | None = None
    """value / baseline; where both were measured in rounds, the median of the rounds' own ratios."""
    note: str = ""


def compared(name: str, value: float, baseline: float, unit: str, note: str = "") -> GpuRow:
    return GpuRow(name, value, unit, baseline, value / baseline if baseline else None, note)


def not_measured(name: str, reason: str) -> GpuRow:
    return GpuRow(name, None, note=reason)


def attempt(name: str, measure: Callable[[], Iterable[GpuRow]]) -> Iterator[GpuRow]:
    """The rows that `measure` makes; where it raises, those before and one with the reason. Memory is given back."""
    reason = ""
    try:
        yield from measure()
    except Exception as error:  # whatever it is, the other rows are still worth having
        show_failure(error)
        reason = reason_of(error)
    release()
    if reason:
        yield not_measured(name, reason + _still_held())


def show_failure(error: Exception) -> None:
    """On stderr: a row has room for one line."""
    if not isinstance(error, Failed):  # its process has shown it
        traceback.print_exception(error, limit=-_FRAMES)


def reason_of(error: BaseException) -> str:
    """One line; the frames of the failure, with the tensors that they hold, are let go of."""
    _let_go(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = str(error).strip().splitlines() or [""]
    return (lines[0] if isinstance(error, Failed) else f"{type(error).__name__}: {lines[0]}")[:_MOST_LETTERS]


def _let_go(error: BaseException) -> None:
    """Clears all frames of the error, of its causes and of its contexts. Any frame that stayed would keep its callers
    in memory too, with all their values."""
    left, seen = [error], set[int]()
    while left:
        each = left.pop()
        if id(each) not in seen:
            seen.add(id(each))
            traceback.clear_frames(each.__traceback__)
            each.__traceback__ = None
            left += [more for more in (each.__context__, each.__cause__) if more is not None]


def _still_held() -> str:
    """A note on the GPU memory that a failure has left allocated, which later measurements lack; empty where it is
    little."""
    gib = torch.cuda.memory_allocated() / GIB if torch.cuda.is_initialized() else 0.0
    return f"; {gib:.1f} GiB stay taken" if gib > _LITTLE_GIB else ""


def release() -> None:
    """Frees the memory of objects that are no longer referred to."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
