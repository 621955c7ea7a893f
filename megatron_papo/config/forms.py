"""Settings that may be written in several forms: one value, a list, or a mapping.

A type says it as `Annotated[Annotated[str, Value] | Annotated[list[...], Listed] | Annotated[..., Mapped], Forms]`.
pydantic then reports the faults of the form that was written alone, and not those of all the others too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, Discriminator, Tag

_VALUE, _LISTED, _MAPPED = "<value>", "<list>", "<mapping>"
Value, Listed, Mapped = Tag(_VALUE), Tag(_LISTED), Tag(_MAPPED)


def _form(value: Any) -> str:
    if isinstance(value, (dict, BaseModel)):
        return _MAPPED
    return _LISTED if isinstance(value, (list, tuple)) else _VALUE


Forms = Discriminator(_form)


def key_path(place: Sequence[str | int]) -> str:
    """The dotted key of a fault's place as pydantic gives it (`data.train[1].weight`), without the forms that pydantic
    names on the way."""
    parts = [part for part in place if part not in (_VALUE, _LISTED, _MAPPED)]
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".")
