"""Cells of a row as text: the question, which may be a conversation, and the right answers, of whatever type.

A question is text, or one turn of the user as TRL and verl write it: `[{"role": "user", "content": ...}]`, its content
text or a list of parts, in which a picture's part stands for a picture of the row. A system turn before it is the row's
own; so is the text of a column for it. Longer conversations are no question.

An answer is what the author of the data set wrote, as far as a file's type tells: a class by its name, 3.0 as 3 (a
column of whole numbers with a gap becomes one of fractions), a date without the midnight that a reader of files adds.
A list holds alternatives, each of them right. What is no text and no number (a dict, a picture) is no answer.
"""

from __future__ import annotations

import datetime
import math
from decimal import Decimal
from typing import Any

import numpy as np

from megatron_papo.data.conversation import PLACEHOLDER
from megatron_papo.files.video_cells import ONLY_PICTURES, VIDEO, video_in_question
from megatron_papo.text.untrusted import shortened

MOST_LETTERS = 65_536
"""Most letters of all answers of a row together. Every response is compared with all of them."""
MOST_ANSWERS = 100
"""Alternatives of a row: each may take as long as `reward.timeout_s` to be compared."""


class BadCell(ValueError):
    """A cell that is no question or no answer. `reason` is one of a few, for counting; the text says more."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(detail)
        self.reason = reason


def question_of(cell: Any) -> tuple[str, Any]:
    """The user's question, `<image>` where a part of it is a picture, and the system turn before it, None without one.

    Raises BadCell.
    """
    if where := video_in_question(cell):
        raise BadCell("video", f"{where}: {ONLY_PICTURES}")
    told = None
    if isinstance(cell, (list, tuple)) and cell and all(isinstance(turn, dict) and "role" in turn for turn in cell):
        turns = list(cell)
        told = _content(turns.pop(0)) if turns[0]["role"] == "system" else None
        cell = _user_turn(turns)
    if isinstance(cell, bytes):
        cell = _decoded(cell, "problem is no text")
    if cell is None or (isinstance(cell, (str, list)) and not cell):
        raise BadCell("no problem")
    if not isinstance(cell, str):
        raise BadCell("problem is no text", f"{_kind(cell)}, not text")
    if not cell.strip():
        raise BadCell("no problem")
    return cell, told


def system_of(cell: Any, told: Any) -> str | None:
    """The text of a row's own system turn: of its column, `cell`, or of its conversation, `told`; None without one.

    Raises BadCell where both are there and differ, and for what is no text.
    """
    texts = []
    for given in (cell, told):
        text = _decoded(given, "system turn") if isinstance(given, bytes) else given
        if text is not None and not isinstance(text, str):
            raise BadCell("system turn", f"{_kind(text)}, not text")
        if text and (mark := next((mark for mark in (PLACEHOLDER, VIDEO) if mark in text), None)):
            raise BadCell("system turn", f"{mark} in its text: pictures belong to the question")
        texts += [text] if text and text.strip() else []
    if len(set(texts)) > 1:
        raise BadCell(
            "system turn", f"{shortened(texts[1])!r} in the conversation, {shortened(texts[0])!r} in the column"
        )
    return texts[0] if texts else None


def answers_of(cell: Any, feature: Any = None) -> tuple[str, ...]:
    """Every right answer, the first one first, none twice and none empty; `feature` is the column's type in `datasets`.

    Raises BadCell for what is no answer; an empty tuple says that there is none.
    """
    values = list(cell) if isinstance(cell, (list, tuple)) else [cell]
    if len(values) > MOST_ANSWERS:
        raise BadCell("answer too long", f"{len(values)} alternatives, at most {MOST_ANSWERS} are compared")
    kind = getattr(feature, "feature", feature) if isinstance(cell, (list, tuple)) else feature
    texts = tuple(dict.fromkeys(text for value in values if (text := _answer(value, kind)).strip()))
    num_letters = sum(map(len, texts))
    if num_letters > MOST_LETTERS:
        raise BadCell("answer too long", f"{num_letters} letters, at most {MOST_LETTERS} are compared")
    return texts


def _user_turn(turns: list[dict[str, Any]]) -> Any:
    """What the only turn of the user says."""
    if [turn["role"] for turn in turns] != ["user"]:
        roles = ", ".join(str(turn["role"]) for turn in turns)
        raise BadCell(
            "problem is no text", f"a conversation of {shortened(roles) or 'nothing'}, not one turn of the user"
        )
    return _content(turns[0])


def _content(turn: dict[str, Any]) -> Any:
    """The content of a turn; parts in a list are joined as chat templates join them. Columns of
    `datasets` give every part all keys, so a key without a value is no part."""
    content = turn.get("content")
    return "".join(map(_part, content)) if isinstance(content, (list, tuple)) else content


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise BadCell("problem is no text", f"{_kind(part)} among the parts of a turn")
    has = {name for name, value in part.items() if value is not None}
    kind = part.get("type") or next(iter(sorted(has)), "nothing")
    if kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    if kind in ("image", "image_url"):
        if has & {"image", "image_url"}:
            raise BadCell("problem is no text", "a picture within a turn: they are read from data.columns.images")
        return PLACEHOLDER
    raise BadCell("problem is no text", f"a part of the kind {shortened(kind)!r} in a turn")


def _answer(value: Any, feature: Any) -> str:
    """One answer; empty for a gap."""
    if isinstance(value, np.generic):
        feature, value = np.asarray(value).dtype, value.item()
    if value is None or isinstance(value, str):
        return value or ""
    if hasattr(feature, "int2str") and isinstance(value, int):
        return str(feature.int2str(value)) if 0 <= value < feature.num_classes else ""
    if isinstance(value, int):  # bool too: True, as a class or a program's output has it
        return str(value)
    if isinstance(value, float):
        return _fraction(value, str(getattr(feature, "dtype", feature)))
    if isinstance(value, Decimal):
        return f"{value.normalize():f}" if value.is_finite() else ""
    if isinstance(value, datetime.datetime):
        midnight = value.tzinfo is None and value.time() == datetime.time()
        return value.date().isoformat() if midnight else value.isoformat(sep=" ")
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, bytes):
        return _decoded(value, "answer is no text")
    raise BadCell("answer is no text", f"{_kind(value)}, not text")


def _fraction(value: float, dtype: str) -> str:
    """The shortest digits that mean this number in its own precision; whole ones without a fraction."""
    if not math.isfinite(value):
        return ""
    if value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    narrow = {"float32": np.float32, "float16": np.float16}.get(dtype)
    return str(value if narrow is None else narrow(value))


def _decoded(value: bytes, reason: str) -> str:
    """Files without a type for text hold it as bytes."""
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        raise BadCell(reason, "bytes that are no UTF-8") from None


def _kind(value: Any) -> str:
    """What a value is, in words: never the value itself."""
    names = {list: "a list", tuple: "a list", dict: "a dict", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), f"a value of type {type(value).__name__}")
