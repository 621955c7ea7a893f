"""Reads settings: a YAML file, then dotted overrides (`loss.perception_coef=0.02`), then validation."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megatron_papo.config.forms import key_path
from megatron_papo.config.tree import Config
from megatron_papo.config.values import faults_of_values, faults_of_variables
from megatron_papo.config.yaml_text import YamlFault, parse, read_mapping
from megatron_papo.text.secret_values import without_secrets
from megatron_papo.text.untrusted import hidden_in

_SHOWN = 200
"""Letters of a value that a refusal shows at most."""


class ConfigError(ValueError):
    """A setting that cannot be; the message names the key's path."""


def load_config(path: Path | None, overrides: list[str] | tuple[str, ...] = (), *, to_run: bool = True) -> Config:
    """Reads `path` (YAML; `extends: FILE` takes another file's values first), then `key.path=value` overrides.

    `to_run`: false for what a run has written of itself, to be looked at alone: secrets may have been left out of it.
    Raises ConfigError with one line a fault, each beginning with the key's path or the file.
    """
    tree = _read_yaml(Path(path)) if path else {}
    texts = {}
    for override in overrides:
        key, equals, texts[key] = override.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(f"{override}: overrides are written key.path=value")
        _put(tree, key.split("."), _scalar(key, texts[key]))
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        config = _validate_with_texts(tree, texts, error)
    faults = list(faults_of_values(config.model_dump(), left_out=not to_run))
    if to_run:
        cluster = config.cluster
        faults += faults_of_variables(cluster.variables, cluster.setup, cluster.sbatch)
    if faults:
        raise ConfigError("\n".join(faults))
    return config


def plain_tree(config: Config, *, secrets: bool = False) -> dict[str, Any]:
    """The settings as plain values for showing and keeping: what looks like a secret is left out of them, unless
    `secrets` are asked for, for a file that only its owner reads."""
    tree = config.model_dump()
    return json.loads(json.dumps(tree if secrets else without_secrets(tree), default=str))  # paths as text


def dump_config(config: Config, *, secrets: bool = False) -> str:
    """The resolved settings as YAML that `load_config` reads back to an equal Config; `secrets` as of `plain_tree`."""
    return yaml.safe_dump(plain_tree(config, secrets=secrets), sort_keys=False)


def _read_yaml(path: Path, extended_by: tuple[str, ...] = ()) -> dict[str, Any]:
    """The file's settings over those of the file that it extends. `extended_by`: the files that led to this one."""
    try:
        tree = read_mapping(path)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except YamlFault as fault:
        raise ConfigError(f"{path}: {fault}") from None
    base = tree.pop("extends", None)
    if base is None:
        return tree
    if not isinstance(base, str) or not base or hidden_in(base):
        raise ConfigError(f"{path}: extends: must be the name of one file, got {_short(base)}")
    chain = (*extended_by, os.path.realpath(path))
    below = path.parent / base
    if os.path.realpath(below) in chain:
        raise ConfigError(f"{path}: extends: {base} extends this file in turn")
    return _merge(_read_yaml(below, chain), tree)


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _validate_with_texts(tree: dict[str, Any], texts: dict[str, str], error: ValidationError) -> Config:
    """Once more, with the overrides of text settings as they were written: `data.system=Answer: yes` is no mapping."""
    for fault in error.errors():
        key = key_path(fault["loc"])
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
        value = parse(text) if text else ""
    except YamlFault:
        return text
    if isinstance(value, str):
        try:
            return float(value)  # YAML 1.1 reads 1e-6 as a string
        except ValueError:
            return text
    return value


def _explain(fault: Any) -> str:
    path = key_path(fault["loc"])
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        message = "unknown key"
    elif fault["type"] == "union_tag_invalid":
        message = f"cannot be written as a {fault['ctx']['tag'].strip('<>')}, got {_short(fault['input'])}"
    elif fault["type"] != "value_error":
        message = f"{message}, got {_short(fault['input'])}"
    return f"{path}: {message}" if path and not message.startswith(f"{path}.") else message


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
