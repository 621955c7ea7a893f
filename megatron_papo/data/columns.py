"""Which columns of a data set are read: those that the settings name, or those of a published layout.

A column that somebody named must be there. The default one of pictures may be missing, for text alone is a data set
too, but not where another column could be meant: a run without its pictures looks like any other.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from megatron_papo.config import ColumnsConfig, DataConfig, SourceConfig
from megatron_papo.text.untrusted import shortened

if TYPE_CHECKING:
    from datasets import Features

_PRESETS = {
    # PAPO's release has problem/images; TIGER-Lab's has question/image, the answer inside \boxed{}.
    "virl39k": (ColumnsConfig(), ColumnsConfig(problem="question", answer="answer", images="image")),
    "geometry3k": (ColumnsConfig(),),
}
_NAMES_OF_PICTURES = re.compile(r"(image|img|picture|photo)s?(_(path|file|url|bytes)s?)?", re.IGNORECASE)


def choose_columns(
    data: DataConfig, source: SourceConfig, key: str, features: Features, *, needs_answer: bool
) -> ColumnsConfig:
    """The names of the columns of one source, which the setting `key` names. Raises ValueError that names the key and
    what there is."""
    preset, chosen = data.columns_of(source)
    if preset == "none":
        _check(chosen, source, key, features, needs_answer)
        return chosen
    for columns in _PRESETS[preset]:
        if {columns.problem, columns.answer, columns.images} <= set(features):
            return columns
    where = key if source.preset else "data"
    raise ValueError(f"{where}.preset: {source.origin} is not laid out as {preset}, has {listed(features)}")


def listed(features: Features) -> str:
    """The names of all columns, for messages."""
    return shortened(", ".join(features), 400)


def _check(columns: ColumnsConfig, source: SourceConfig, key: str, features: Features, needs_answer: bool) -> None:
    wanted = {
        "problem": columns.problem,
        "answer": columns.answer if needs_answer else None,
        "images": columns.images,
        "system": columns.system,
    }
    for cell, column in wanted.items():
        if column is None or column in features:
            continue
        where = key if cell in source.columns else "data"
        lacks = f"{where}.columns.{cell}: {source.origin} has no column {column!r}"
        if cell != "images" or column != ColumnsConfig().images:
            raise ValueError(f"{lacks}, has {listed(features)}")
        if others := [other for other, feature in features.items() if _seems_to_hold_pictures(other, feature)]:
            raise ValueError(f"{lacks}, but {others[0]!r}, which seems to hold pictures; null reads the text alone")


def _seems_to_hold_pictures(name: str, feature: Any) -> bool:
    """By the column's name, or by its type in `datasets`."""
    inner = getattr(feature, "feature", feature)
    typed = type(inner).__name__ == "Image" or (isinstance(inner, dict) and {"bytes", "path"} <= set(inner))
    return typed or _NAMES_OF_PICTURES.fullmatch(name) is not None
