"""The entries of `data.train` and `data.eval`: where rows come from, which of them are read, and how often."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from megatron_papo.config.basics import Positive, Section
from megatron_papo.config.forms import Forms, Listed, Mapped, Value

Preset = Literal["none", "virl39k", "geometry3k"]
Cell = str | int | float | bool | None
_NAME = re.compile(r"[\w.-]{1,64}")


class CellRange(Section):
    """A condition on a cell; all that is given must hold, and a cell without a value never passes."""

    min: float | None = None
    """Least number that passes."""
    max: float | None = None
    """Largest number that passes."""
    matches: str | None = None
    """Regular expression that is found in the cell's text (`re.search`)."""

    @field_validator("matches")
    @classmethod
    def _is_pattern(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        return pattern

    @model_validator(mode="after")
    def _says_something(self) -> CellRange:
        if self.min is None and self.max is None and self.matches is None:
            raise ValueError("a condition needs min, max or matches")
        return self


Condition = Annotated[Annotated[Cell, Value] | Annotated[list[Cell], Listed] | Annotated[CellRange, Mapped], Forms]
Filter = Annotated[Annotated[str | None, Value] | Annotated[dict[str, Condition], Mapped], Forms]


class SourceConfig(Section):
    path: str | None = None
    """File, pattern of files, folder or name on the hub, as `datasets` reads them."""
    function: str | None = None
    """In place of `path`: a function of your own, `module:function`, called as `function(split, **options)`. It returns
    a `datasets.Dataset` or a list of rows (dicts), the same on every rank."""
    options: dict[str, Any] = {}
    """Arguments by keyword that `function` is called with."""
    name: str | None = None
    """Name of the source in metrics and for rewards; null: made from the path or the function."""
    split: str | None = None
    """Name of the split that is read; null: as data.split or data.eval_split."""
    preset: Preset | None = None
    """As data.preset, for this source; null: data.preset, where the entry has no `columns`."""
    columns: dict[str, str | None] = {}
    """Names of columns of this source, over data.columns."""
    filter: Filter = None
    """Which rows are read: for each column a value, a list of values of which one must be there, or conditions
    (`min`, `max`, `matches`, a regular expression); all columns must pass. Or `module:function`, a function of your own
    that is given a row as a dict and returns true or false."""
    source_column: str | None = None
    """Column that names the source of each row, in place of `name`."""
    weight: Positive = 1.0
    """How often each row is drawn in an epoch of training: 2 takes every row twice, 0.5 another random half in each
    epoch."""

    @field_validator("name")
    @classmethod
    def _is_a_name(cls, name: str | None) -> str | None:
        if name is not None and not _NAME.fullmatch(name):
            raise ValueError(
                f"{name!r}: at most 64 letters, digits, `_`, `-` and `.`, since metrics are named after it"
            )
        return name

    @model_validator(mode="after")
    def _check(self) -> SourceConfig:
        if (self.path is None) == (self.function is None):
            raise ValueError("needs either path or function")
        if self.options and self.function is None:
            raise ValueError("options: are arguments of function, which is not set")
        if self.columns and self.preset not in (None, "none"):
            raise ValueError(f"columns: preset={self.preset} names the columns; give one of the two")
        return self

    @property
    def origin(self) -> str:
        """Where the rows come from, for messages: the path, or the name of the function."""
        return self.path or self.function or ""


def _plain_where_it_can_be(value: Any) -> Any:
    """A list of one plain name is that name; one mapping is a list of it."""
    if isinstance(value, (dict, SourceConfig)):
        return [value]
    if isinstance(value, (list, tuple)) and len(value) == 1 and isinstance(value[0], str):
        return value[0]
    return value


Entry = Annotated[Annotated[str, Value] | Annotated[SourceConfig, Mapped], Forms]
Sources = Annotated[
    Annotated[str | None, Value] | Annotated[list[Entry], Listed, Field(min_length=1)],
    Forms,
    BeforeValidator(_plain_where_it_can_be),
]
"""A name, or a list of names and mappings."""


Written = str | Sequence[str | SourceConfig] | None


def source_key(which: str, value: Written, place: int) -> str:
    """The key of an entry of data.train or data.eval, which `which` says, for messages."""
    return f"data.{which}" if isinstance(value, str) else f"data.{which}[{place}]"


def names_sources(value: Written) -> bool:
    """Whether rows are told apart by their source: there are several, or the only one is given a name."""
    if value is None or isinstance(value, str):
        return False
    named = (entry.name or entry.source_column for entry in value if isinstance(entry, SourceConfig))
    return len(value) > 1 or any(named)


def described_sources(value: Any) -> str:
    """A setting of the type `Sources` in a few words, also as it was kept in plain values: the paths and functions."""
    listed = value if isinstance(value, list) else [value]
    return ", ".join(
        str(entry.get("path") or entry.get("function")) if isinstance(entry, dict) else str(entry) for entry in listed
    )


def source_entries(value: Written) -> tuple[SourceConfig, ...]:
    """The entries of a setting of the type `Sources`, each a mapping with a name that no other has."""
    listed = [] if value is None else [value] if isinstance(value, str) else value
    entries = [SourceConfig(path=entry) if isinstance(entry, str) else entry for entry in listed]
    names = [entry.name for entry in entries if entry.name is not None]
    short = Counter(_made_names(entry)[0] for entry in entries if entry.name is None)
    for place, entry in enumerate(entries):
        if entry.name is not None:
            continue
        first, longer = _made_names(entry)
        name = unique = longer if short[first] > 1 or first in names else first
        number = 1
        while unique in names:
            number += 1
            unique = f"{name}_{number}"
        names.append(unique)
        entries[place] = entry.model_copy(update={"name": unique})
    return tuple(entries)


def _made_names(entry: SourceConfig) -> tuple[str, str]:
    """Two names for an entry without one: the file, folder or function, and this behind the folder or module in which
    it is. A pattern of files has the name of the folder, unless it is all there is."""
    if entry.path is None:
        module, _, function = entry.origin.rpartition(":")
        parts = [module.rpartition(".")[2], function]
    else:
        parts = list(PurePosixPath(entry.path.partition("://")[2] or entry.path).parts) or ["data"]
        plain = [part for part in parts if not any(letter in part for letter in "*?[")]
        parts = plain or parts
        if len(plain) == len(parts):
            parts[-1] = re.sub(r"(?<=.)\.[A-Za-z]\w*$", "", parts[-1])
    cleaned = [re.sub(r"[^\w.-]+", "_", part).strip("_") or "data" for part in parts]
    return cleaned[-1][:64], "_".join(cleaned[-2:])[:64]
