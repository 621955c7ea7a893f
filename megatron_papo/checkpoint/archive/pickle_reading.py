"""Pickles read as data: nothing that a file names is imported or called.

An object in a pickle becomes a `PickledObject`, if its class is one of those that the caller lists by their exact
names; any other class is refused. So a hostile file can give no more than numbers, texts and containers of them. The
unpickler is the slower one, written in Python: the one in C allocates as much memory as a few bytes of a file tell it
to. What the data mean is left to the caller.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from typing import Any

Name = tuple[str, str]
"""The module of a class or constant, and its name within that module."""
_MOST_REASON = 200
"""Characters of a reason that are shown."""


class PickledObject:
    """An object of a pickle: the arguments its class was called with, and the state it was given."""

    arguments: tuple[Any, ...]
    state: Any

    def __new__(cls, *arguments: Any) -> PickledObject:
        record = object.__new__(cls)
        record.arguments, record.state = arguments, None
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def fields(self) -> dict[str, Any]:
        """The fields, where the object is of a dataclass. Raises TypeError where it is not."""
        if not isinstance(self.state, dict):
            raise TypeError(f"{type(self).__name__} without fields")
        return self.state


def read_pickle(data: bytes, classes: frozenset[Name], constants: Mapping[Name, Any], storages: bool = False) -> Any:
    """The data of a pickle, in which every object of `classes` is a `PickledObject` whose type has the class's name.

    `constants` says what other names stand for. With `storages`, a tensor may refer to its storage; the reference
    becomes the tuple that says where the storage is. Raises ValueError for anything else, and for what is no pickle.
    """
    try:
        return _Unpickler(data, classes, constants, storages).load()
    except Exception as error:  # a stranger's bytes may fail anywhere in it
        raise ValueError(line_of(error)) from None


def line_of(error: Exception) -> str:
    """What went wrong with a stranger's bytes, which the error may quote, in one line of bounded length."""
    kind = "" if isinstance(error, ValueError) and str(error) else f"{type(error).__name__} "
    return " ".join(f"{kind}{error}".split())[:_MOST_REASON]


class _Unpickler(pickle._Unpickler):
    def __init__(self, data: bytes, classes: frozenset[Name], constants: Mapping[Name, Any], storages: bool):
        super().__init__(io.BytesIO(data))
        # new types for each reading: a pickle can set attributes of a class that it names
        self._known = {**constants, **{name: type(name[1], (PickledObject,), {}) for name in classes}}
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
