"""What a part of the GPU check reports: a figure beside what it is compared with, or why there is none."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

GIB = 2**30
NEEDS_GPU = "needs a GPU"
_MOST_LETTERS = 200
"""Of a reason."""
_FRAMES = 8
"""Of a failure's traceback, innermost."""
_LITTLE_GIB = 0.5


class Failed(Exception):
    """Whose message alone is a row's reason."""


@dataclass(frozen=True)
class Options:
    shape: Literal["3b", "tiny"]
    quick: bool = False
    """Small and few: to see that it runs."""
    rounds: int = 5
    """Times that every side is measured, in turns."""
    recompute: str | None = None
    """As `model.recompute`: that alone is measured where what fits would otherwise be looked for."""
    ends_at: float | None = None
    """When the part will be cut off, by time.monotonic."""


@dataclass(frozen=True)
class GpuRow:
    name: str
    value: float | None
    """In `unit`; None: not measured, `note` says why."""
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
    """Of all frames that ended by it, and by what it was raised in the course of: a frame that is left somewhere keeps
    its callers too, with all that they had."""
    left, seen = [error], set[int]()
    while left:
        each = left.pop()
        if id(each) not in seen:
            seen.add(id(each))
            traceback.clear_frames(each.__traceback__)
            each.__traceback__ = None
            left += [more for more in (each.__context__, each.__cause__) if more is not None]


def _still_held() -> str:
    """What memory of this process's own a failure has left behind, which those after it will lack."""
    gib = torch.cuda.memory_allocated() / GIB if torch.cuda.is_initialized() else 0.0
    return f"; {gib:.1f} GiB stay taken" if gib > _LITTLE_GIB else ""


def release() -> None:
    """Memory of what is no longer referred to."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
