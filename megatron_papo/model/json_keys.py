"""Typed access to a JSON settings file whose faults name the file and the key. Imports nothing heavy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json(file: Path) -> dict[str, Any]:
    """The mapping in `file`. Raises ValueError naming the file when there is none."""
    try:
        tree = json.loads(file.read_text())
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not JSON: {error}") from None
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
            value = float(value)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self.fault(key, f"is {value!r}, not {kind.__name__}")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        value = self.get(key, int, default)
        if value < 1:
            raise self.fault(key, f"is {value}, must be at least 1")
        return value

    def counts(self, key: str, default: list[int]) -> tuple[int, ...]:
        """A list of numbers from 0 on."""
        value = self.get(key, list, default)
        if not all(isinstance(item, int) and item >= 0 for item in value):
            raise self.fault(key, f"is {value!r}, not a list of counts")
        return tuple(value)

    def must_be(self, key: str, allowed: Any) -> None:
        value = self.tree.get(key, allowed)
        if value != allowed:
            raise self.fault(key, f"is {value!r}; only {allowed!r} is supported")
