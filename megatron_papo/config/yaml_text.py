"""Reads YAML that a person wrote, with every refusal one line that names the file.

Stricter than YAML: a key that stands twice is refused, since the first value would be lost without a word; aliases may
not make a small file a huge tree; a file is read as UTF-8 whatever the language of the shell.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

_MOST_BYTES = 4 * 2**20
_MOST_VALUES = 100_000
"""Most values of a whole tree, with its aliases written out."""
_MERGE_TAG = "tag:yaml.org,2002:merge"


class YamlFault(ValueError):
    """Why a text or a file is no settings, in one line without the file's name."""


def read_mapping(path: Path) -> dict[str, Any]:
    """The file's top level; an empty file is an empty mapping. Raises YamlFault; FileNotFoundError where none is."""
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: of a name with a null byte
        raise YamlFault(getattr(error, "strerror", None) or str(error)) from None
    if len(content) > _MOST_BYTES:
        raise YamlFault(f"more than {_MOST_BYTES // 2**20} MiB are no settings")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise YamlFault(f"not UTF-8: byte {error.start} is {content[error.start]:#04x}") from None
    tree = parse(text)
    if tree is not None and not isinstance(tree, dict):
        raise YamlFault(f"the top level must be a mapping, not {type(tree).__name__}")
    return tree or {}


def parse(text: str) -> Any:
    """The value of a YAML text. Raises YamlFault."""
    try:
        tree = yaml.load(text, _Loader)  # a SafeLoader: it makes plain values and runs nothing
    except yaml.YAMLError as error:
        raise YamlFault(f"not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise YamlFault("not YAML: nested too deeply") from None
    except (ValueError, TypeError) as error:  # a date without a month 13, a number of 5000 digits
        raise YamlFault(f"not YAML: {error}") from None
    _size(tree, {})
    return tree


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE_TAG:
                if key.value in keys:
                    raise ConstructorError(None, None, f"the key {key.value!r} stands twice", key.start_mark)
                keys.add(key.value)
        return super().construct_mapping(node, deep)


def _size(tree: Any, known: dict[int, int]) -> int:
    """Values in the tree with every alias written out; one that holds itself has no end."""
    if not isinstance(tree, dict | list | tuple | set):
        return 1
    if id(tree) not in known:
        known[id(tree)] = _MOST_VALUES + 1  # until it is counted
        known[id(tree)] = 1 + sum(_size(inner, known) for inner in (tree.values() if isinstance(tree, dict) else tree))
    if known[id(tree)] > _MOST_VALUES:
        raise YamlFault(f"aliases (&, *) make more than {_MOST_VALUES:,} values of it")
    return known[id(tree)]
