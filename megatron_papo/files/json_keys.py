"""Typed access to a JSON settings file whose faults name the file and the key. Imports nothing heavy."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from megatron_papo.files.held_file import read_small

MAX_JSON_BYTES = 64 * 2**20
"""The index of a thousand layers has a tenth of it."""
_MOST = 2**24
"""Largest value of any count: no model has ever had more of anything, and a page of zeros would be allocated
before it fails."""

_MOST_LISTED = 4096
_SHOWN = 80


def read_json(file: Path) -> dict[str, Any]:
    """The mapping in `file`. Raises ValueError naming the file when there is none."""
    try:
        tree = json.loads(read_small(file, MAX_JSON_BYTES).decode())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{file}: nested too deep") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{file}: the top level must be a mapping, not {type(tree).__name__}")
    return tree


class Keys:
    """Typed access to one section of the file."""

    def __init__(self, tree: dict[str, Any], source: str, prefix: str):
        self.tree, self.source, self.prefix = tree, source, prefix

    def fault(self, key: str, message: str) -> ValueError:
        return ValueError(f"{self.source}: {self.prefix}{key}: {message}")

    def section(self, key: str) -> Keys:
        value = self.tree.get(key)
        if not isinstance(value, dict):
            raise self.fault(key, "missing" if value is None else "is not a section")
        return Keys(value, self.source, f"{self.prefix}{key}.")

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self.tree.get(key, default)
        if value is None:
            raise self.fault(key, "missing")
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value) if abs(value) <= _MOST else math.inf
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self.fault(key, f"is {shown(value)}, not {kind.__name__}")
        return value

    def positive(self, key: str, default: float) -> float:
        """A finite number above 0."""
        value: float = self.get(key, float, default)
        if not 0 < value < math.inf:
            raise self.fault(key, f"is {value}, must be a number above 0")
        return value

    def count(self, key: str, default: int | None = None, most: int = _MOST) -> int:
        """From 1 to `most`."""
        return self._within(key, self.get(key, int, default), 1, most)

    def index(self, key: str, default: int) -> int:
        """A place in the vocabulary, from 0 on."""
        return self._within(key, self.get(key, int, default), 0, _MOST)

    def counts(self, key: str, default: list[int]) -> tuple[int, ...]:
        """A short list of numbers from 0 on."""
        value = self.get(key, list, default)
        if not all(type(item) is int and 0 <= item <= _MOST for item in value) or len(value) > _MOST_LISTED:
            raise self.fault(key, f"is {shown(value)}, not a list of counts")
        return tuple(value)

    def _within(self, key: str, value: int, least: int, most: int) -> int:
        if value < least:
            raise self.fault(key, f"is {shown(value)}, must be at least {least}")
        if value > most:
            raise self.fault(key, f"is {shown(value)}, at most {most} is believed")
        return value

    def flag(self, key: str) -> bool:
        """False where it is missing."""
        value = self.tree.get(key)
        if value not in (None, True, False) or (isinstance(value, (int, float)) and not isinstance(value, bool)):
            raise self.fault(key, f"is {shown(value)}, not true or false")
        return bool(value)

    def must_be(self, key: str, allowed: Any) -> None:
        value = self.tree.get(key, allowed)
        if value != allowed:
            raise self.fault(key, f"is {shown(value)}; only {allowed!r} is supported")


def shown(value: Any) -> str:
    """On one line, and not the length of what a stranger wrote."""
    text = ascii(value) if not isinstance(value, int) or abs(value) < 10**30 else "a number of more than 30 digits"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def shown_name(name: str) -> str:
    """As it is, where it could be the name of a tensor."""
    return name if name.isascii() and name.isprintable() and len(name) <= _SHOWN else shown(name)
