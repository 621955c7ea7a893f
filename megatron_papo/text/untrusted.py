"""Makes text that is not trusted harmless for terminals, logs and pages.

A terminal obeys control characters (`\\x1b]0;...` renames its window, `\\r` overwrites what was said), and characters
that turn the direction of writing make a line read as another one. Here each becomes its escape in Python's spelling.
Imports the standard library only, for Python 3.9 too: the supervisor of a cluster job uses it. Leaves out the escaping
of HTML, Markdown and rich's markup, which the writer of each does on top.
"""

from __future__ import annotations

import re

DIRECTIONS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""Marks, embeddings, overrides and isolates of the direction of writing."""
_HIDDEN = re.compile(f"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff{DIRECTIONS}]")
"""C0, delete, C1; separators of lines; bytes that were no text; directions."""
LINES = "\n\t"
"""`keep` of a text of several lines."""


def as_text(value: object, keep: str = "") -> str:
    """`str(value)`, in which what a terminal would obey is visible: `\\x1b`, `\\n`, `\\u202e`. Characters of `keep`
    stay as they are. What was made visible once stays the same."""
    return _HIDDEN.sub(lambda match: match[0] if match[0] in keep else _escape(match[0]), str(value))


def hidden_in(text: str, keep: str = "") -> str:
    """The first character of `text` that `as_text` would replace, as it would show it; empty where there is none."""
    return next((_escape(character) for character in _HIDDEN.findall(text) if character not in keep), "")


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode()


def shortened(value: object, most: int = 80) -> str:
    """The beginning of `str(value)`, for messages: a cell of a data set may hold a whole picture as text."""
    text = str(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"
