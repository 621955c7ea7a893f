"""What `reward.function` returned for each row: a number, numbers by name, or the reason why it is neither."""

from __future__ import annotations

import math
import re
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_papo.text.untrusted import as_text, shortened

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")
_MOST_SHOWN = 300
"""Letters of an error, which may quote a whole answer or page."""
FAILED = "failed"
"""The part of a reward that is 1 where the function failed and 0 elsewhere."""


@dataclass(frozen=True)
class Failed:
    """A row without a value."""

    reason: str
    """Begins with a verb, so that the function's name can stand before it."""


Value = float | dict[str, float]
"""A number, or named parts."""


def failed_with(error: BaseException) -> Failed:
    """The failure that an exception is, with the place in the user's own code that raised it."""
    return Failed(f"failed: {type(error).__name__}: {as_text(shortened(error, _MOST_SHOWN))}{_place(error)}")


def _place(error: BaseException) -> str:
    """The innermost place outside Python's library and installed packages; empty where there is none."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_library(frame.filename)]
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""


def _is_library(file: str) -> bool:
    return file.startswith((sys.prefix, sys.base_prefix, str(Path(__file__).parents[1]), "<"))


def read_returned(returned: Any, num_rows: int) -> list[Value | Failed]:
    """The value of each of `num_rows` rows; all of them have failed where `returned` is no list of that length."""
    if not isinstance(returned, list | tuple) and not hasattr(returned, "tolist"):
        return [Failed(f"returned {type(returned).__name__}, not a list with one entry a row")] * num_rows
    entries = list(returned)
    if len(entries) != num_rows:
        return [Failed(f"returned {len(entries)} entries for {num_rows} rows")] * num_rows
    return [_value(entry) for entry in entries]


def _value(entry: Any) -> Value | Failed:
    if isinstance(entry, BaseException):
        return failed_with(entry)
    if not isinstance(entry, Mapping):
        return _number(entry)
    parts: dict[str, float] = {}
    for name, part in entry.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name == FAILED:
            return Failed(f"returned a part named {as_text(shortened(repr(name)))}, which is no name for a part")
        number = _number(part)
        if isinstance(number, Failed):
            return Failed(f"{number.reason} for the part {name}")
        parts[name] = number
    return parts or Failed("returned a mapping without parts")


def _number(entry: Any) -> float | Failed:
    if isinstance(entry, str | bytes) or not hasattr(entry, "__float__"):
        return Failed(f"returned {as_text(shortened(repr(entry)))}")
    try:
        number = float(entry)
    except Exception as error:  # of a tensor of many numbers, say
        return failed_with(error)
    return number if math.isfinite(number) else Failed(f"returned {number}")
