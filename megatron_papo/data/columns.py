"""Which columns of a data set are read: those that the settings name, or those of a published layout.

A column that somebody named must be there. The default one of pictures may be missing, for text alone is a data set
too, but not where another column could be meant: a run without its pictures looks like any other.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from megatron_papo.config import ColumnsConfig, DataConfig
from megatron_papo.text.untrusted import shortened

if TYPE_CHECKING:
    from datasets import Features

_PRESETS = {
    # PAPO's release has problem/images; TIGER-Lab's has question/image, the answer inside \boxed{}.
    "virl39k": (ColumnsConfig(), ColumnsConfig(problem="question", answer="answer", images="image")),
    "geometry3k": (ColumnsConfig(),),
}
_NAMES_OF_PICTURES = re.compile(r"(image|img|picture|photo)s?(_(path|file|url|bytes)s?)?", re.IGNORECASE)


def choose_columns(data: DataConfig, name: str, features: Features, *, needs_answer: bool) -> ColumnsConfig:
    """The names of the columns of the data set `name`. Raises ValueError that names the key and what there is."""
    if data.preset == "none":
        _check(data.columns, name, features, needs_answer)
        return data.columns
    for columns in _PRESETS[data.preset]:
        if {columns.problem, columns.answer, columns.images} <= set(features):
            return columns
    raise ValueError(f"data.preset: {name} is not laid out as {data.preset}, has {listed(features)}")


def listed(features: Features) -> str:
    """The names of all columns, for messages."""
    return shortened(", ".join(features), 400)


def _check(columns: ColumnsConfig, name: str, features: Features, needs_answer: bool) -> None:
    wanted = {"problem": columns.problem, "answer": columns.answer if needs_answer else None, "images": columns.images}
    for key, column in wanted.items():
        if column is None or column in features:
            continue
        lacks = f"data.columns.{key}: {name} has no column {column!r}"
        if key != "images" or column != ColumnsConfig().images:
            raise ValueError(f"{lacks}, has {listed(features)}")
        if others := [other for other, feature in features.items() if _seems_to_hold_pictures(other, feature)]:
            raise ValueError(f"{lacks}, but {others[0]!r}, which seems to hold pictures; null reads the text alone")


def _seems_to_hold_pictures(name: str, feature: Any) -> bool:
    """By the column's name, or by its type in `datasets`."""
    inner = getattr(feature, "feature", feature)
    typed = type(inner).__name__ == "Image" or (isinstance(inner, dict) and {"bytes", "path"} <= set(inner))
    return typed or _NAMES_OF_PICTURES.fullmatch(name) is not None
