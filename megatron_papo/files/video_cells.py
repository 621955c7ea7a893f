"""Whether a row asks about a video, which is not read: told from its cells alone. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

VIDEO = "<video>"
"""Where other programs put a video; a text that has one asks about something that is not read here."""
ONLY_PICTURES = "only pictures are read"
_COLUMNS = ("videos", "video")
_PARTS = ("video", "video_url")
"""Kinds of parts of a turn, as chat interfaces write them."""


def video_column(cells: Mapping[str, Any], images: str | None) -> str | None:
    """Where a row has a video in a column of its own, in words; None where it has none. `images` is the column that
    pictures are read from, whatever its name."""
    column = next((name for name in _COLUMNS if name != images and cells.get(name)), None)
    return None if column is None else f"in column {column!r}"


def video_in_question(cell: Any) -> str | None:
    """Where a question, text or turns of a conversation, has a video, in words; None where it has none."""
    if isinstance(cell, bytes):
        cell = cell.decode(errors="replace")
    if isinstance(cell, str):
        return f"{VIDEO} in the text" if VIDEO in cell else None
    inner = cell if isinstance(cell, (list, tuple)) else []
    if isinstance(cell, dict):
        kind = cell.get("type") or next((part for part in _PARTS if cell.get(part) is not None), None)
        if kind in _PARTS:
            return "a part of a turn"
        inner = [cell.get("content"), cell.get("text")]
    return next((found for part in inner if (found := video_in_question(part))), None)
