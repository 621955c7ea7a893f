"""Writes docs/configuration.md from `megatron_papo/config/`: every key, its default, what it takes, what it means."""

from __future__ import annotations

import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_papo.runtime.needed_packages import check_packages

check_packages()

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_papo.config import Config

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
HEAD = """# Settings

A YAML file holds the tree below (`extends: FILE` takes another file's values first); `key.path=value` on the command
line wins over it. `papo train CONFIG --dry-run` prints what holds. Unknown keys and impossible values are refused with
the key's path before any rank starts. This page is written by `python tools/document_settings.py`.
"""


def page() -> str:
    """The whole page docs/configuration.md."""
    parts = [HEAD]
    for name, field in Config.model_fields.items():
        section = typing.cast("type[BaseModel]", field.annotation)
        parts.append(f"\n## `{name}`\n\n| key | default | takes | |\n|---|---|---|---|\n")
        parts += [
            f"| `{key}` | `{_default(info)}` | {_takes(info)} | {_text(info)} |\n" for key, info in _keys(name, section)
        ]
    return "".join(parts)


def _keys(path: str, section: type[BaseModel]) -> Iterator[tuple[str, FieldInfo]]:
    """The keys of a section; those of a list's mappings as `key[].inner`, once where several lists have the same."""
    told: list[type[BaseModel]] = []
    for name, info in section.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from _keys(f"{path}.{name}", info.annotation)
            continue
        yield f"{path}.{name}", info
        for entry in _sections_in(info.annotation, within_list=False):
            if entry not in told:
                told.append(entry)
                yield from _keys(f"{path}.{name}[]", entry)


def _sections_in(annotation: typing.Any, within_list: bool) -> Iterator[type[BaseModel]]:
    """The sections that lists of a type hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel) and within_list:
        yield annotation
    if typing.get_origin(annotation) in (list, typing.Union, types.UnionType, typing.Annotated):
        for part in typing.get_args(annotation):
            yield from _sections_in(part, within_list or typing.get_origin(annotation) is list)


def _default(info: FieldInfo) -> str:
    value = info.default
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value) or '""'


def _takes(info: FieldInfo) -> str:
    return _type(info.annotation) + _limits(info.metadata)


def _type(annotation: typing.Any) -> str:
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(annotation))
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if part is type(None) else _type(part) for part in typing.get_args(annotation))
    if origin is typing.Annotated:
        kind, *metadata = typing.get_args(annotation)
        return _type(kind) + _limits([part for field in metadata for part in getattr(field, "metadata", [field])])
    if origin is list:
        return f"list of {_type(typing.get_args(annotation)[0])}"
    if origin is dict:
        return f"mapping of names to {_type(typing.get_args(annotation)[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping"
    names = {
        str: "text",
        Path: "path",
        int: "whole number",
        float: "number",
        bool: "true, false",
        typing.Any: "anything",
    }
    return names[annotation]


def _limits(metadata: list[typing.Any]) -> str:
    signs = {Ge: ("≥", "ge"), Gt: (">", "gt"), Le: ("≤", "le"), Lt: ("<", "lt")}
    limits = [
        f"{signs[type(part)][0]} {getattr(part, signs[type(part)][1]):g}" for part in metadata if type(part) in signs
    ]
    return " " + " and ".join(limits) if limits else ""


def _text(info: FieldInfo) -> str:
    return " ".join((info.description or "").split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
