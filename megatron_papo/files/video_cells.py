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
_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm")
"""Of files that hold videos."""


def video_column(cells: Mapping[str, Any], images: str | None) -> str | None:
    """Where a row has a video in a column of its own, in words; None where it has none. `images` is the column that
    pictures are read from, whatever its name."""
    column = next((name for name in _COLUMNS if name != images and cells.get(name)), None)
    if column is not None:
        return f"in column {column!r}"
    pictures = cells.get(images) if images is not None else None
    for picture in pictures if isinstance(pictures, (list, tuple)) else [pictures]:
        file = picture.get("path") if isinstance(picture, dict) else picture
        if isinstance(file, str) and file.lower().endswith(_SUFFIXES):
            return f"a video's file in column {images!r}"
    return None


def video_in_question(cell: Any) -> str | None:
    """Where a question, text or turns of a conversation, has a video, in words; None where it has none."""
    parts = [cell]  # a list of what is left, not a call within a call: lists may lie in lists to any depth
    for part in parts:
        if isinstance(part, bytes):
            part = part.decode(errors="replace")
        if isinstance(part, str) and VIDEO in part:
            return f"{VIDEO} in the text"
        if isinstance(part, dict):
            kind = part.get("type") or next((name for name in _PARTS if part.get(name) is not None), None)
            if kind in _PARTS:
                return "a part of a turn"
            parts += [part.get("content"), part.get("text")]
        elif isinstance(part, (list, tuple)):
            parts += part
    return None
