"""Reads settings: a YAML file, then dotted overrides (`loss.perception_coef=0.02`), then validation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megatron_papo.config.tree import Config


class ConfigError(ValueError):
    """A setting that cannot be; the message names the key's path."""


def load_config(path: Path | None, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Reads `path` (YAML; `extends: FILE` takes another file's values first), then `key.path=value` overrides.

    Raises ConfigError with one line a fault, each beginning with the key's path.
    """
    tree = _read_yaml(Path(path)) if path else {}
    texts = {}
    for override in overrides:
        key, equals, texts[key] = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"{override}: overrides are written key.path=value")
        _put(tree, key.split("."), _scalar(key, texts[key]))
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        return _validate_with_texts(tree, texts, error)


def dump_config(config: Config) -> str:
    """The resolved settings as YAML that `load_config` reads back to an equal Config."""
    return yaml.safe_dump(json.loads(config.model_dump_json()), sort_keys=False)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: the top level must be a mapping, not {type(tree).__name__}")
    base = tree.pop("extends", None)
    return _merge(_read_yaml(path.parent / base), tree) if base else tree


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _validate_with_texts(tree: dict[str, Any], texts: dict[str, str], error: ValidationError) -> Config:
    """Once more, with the overrides of text settings as they were written: `data.system=Answer: yes` is no mapping."""
    for fault in error.errors():
        key = ".".join(str(part) for part in fault["loc"])
        if fault["type"] in ("string_type", "path_type") and key in texts:
            _put(tree, key.split("."), texts[key])
    try:
        return Config.model_validate(tree)
    except ValidationError as last:
        raise ConfigError("\n".join(_explain(fault) for fault in last.errors())) from None


def _put(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    for depth, key in enumerate(keys[:-1]):
        if not isinstance(tree.get(key), dict):
            if tree.get(key) is not None:
                raise ConfigError(f"{'.'.join(keys[: depth + 1])}: is a value, not a section")
            tree[key] = {}
        tree = tree[key]
    tree[keys[-1]] = value


def _scalar(key: str, text: str) -> Any:
    try:
        value = yaml.safe_load(text) if text else ""
    except yaml.YAMLError:
        return text
    if isinstance(value, str):
        try:
            return float(value)  # YAML 1.1 reads 1e-6 as a string
        except ValueError:
            return text
    return value


def _explain(fault: Any) -> str:
    path = ".".join(str(part) for part in fault["loc"])
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        message = "unknown key"
    elif fault["type"] != "value_error":
        message = f"{message}, got {fault['input']!r}"
    return f"{path}: {message}" if path else message
