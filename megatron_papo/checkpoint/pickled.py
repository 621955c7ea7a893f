"""Pickles read as data: nothing is imported and nothing is called that a file names.

What a pickle makes of a class becomes a `Record` of it, of the classes that the caller knows by their exact names; any
other is refused. So a hostile file can say no more than numbers, texts and containers of them. The slower unpickler,
in Python: the one in C gives a few bytes of a file as much memory as they ask for. Leaves out what the data mean.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from typing import Any

Name = tuple[str, str]
"""Module and name within it."""
_MOST_REASON = 200
"""Characters."""


class Record:
    """An object of a pickle: what its class was called with, and the state it was given."""

    arguments: tuple[Any, ...]
    state: Any

    def __new__(cls, *arguments: Any) -> Record:
        record = object.__new__(cls)
        record.arguments, record.state = arguments, None
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def fields(self) -> dict[str, Any]:
        """Of a dataclass. Raises TypeError where there are none."""
        if not isinstance(self.state, dict):
            raise TypeError(f"{type(self).__name__} without fields")
        return self.state


def read_pickle(data: bytes, classes: frozenset[Name], constants: Mapping[Name, Any], storages: bool = False) -> Any:
    """The data, with a `Record`, whose class has the pickle's name for it, for each object of `classes`.

    `constants`: what other names stand for. `storages`: whether a tensor may refer to its storage, which becomes the
    tuple that says where it is. Raises ValueError for anything else, and for what is no pickle.
    """
    try:
        return _Unpickler(data, classes, constants, storages).load()
    except Exception as error:  # a stranger's bytes may fail anywhere in it
        raise ValueError(line_of(error)) from None


def line_of(error: Exception) -> str:
    """What went wrong with a stranger's bytes, which it may quote, in a line of a bounded length."""
    kind = "" if isinstance(error, ValueError) and str(error) else f"{type(error).__name__} "
    return " ".join(f"{kind}{error}".split())[:_MOST_REASON]


class _Unpickler(pickle._Unpickler):
    def __init__(self, data: bytes, classes: frozenset[Name], constants: Mapping[Name, Any], storages: bool):
        super().__init__(io.BytesIO(data))
        # of this reading alone: a pickle can set attributes of a class that it names
        self._known = {**constants, **{name: type(name[1], (Record,), {}) for name in classes}}
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._known[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} does not belong there") from None

    def persistent_load(self, pid: Any) -> Any:
        if not self._storages:
            raise pickle.UnpicklingError("a reference to something outside")
        return pid
