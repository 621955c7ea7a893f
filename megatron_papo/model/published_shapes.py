"""Published models of all families by name: config.json, shape and number of parameters, without any download.

A family's module `published` holds the table NUM_PARAMETERS (name -> parameters of the whole model), the pattern
HUB_NAME of names on the hub, and the function `published_config(name)`; a family that has no such module has no
published models. Imports no torch.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_papo.config import ConfigError
from megatron_papo.model.family import families, family_named
from megatron_papo.model.shape import ModelShape


def published_models() -> dict[str, int]:
    """The number of parameters of every published model, by name; within a family from the smallest to the largest."""
    return {name: number for module in _modules() for name, number in module.NUM_PARAMETERS.items()}


def published_config(name: str) -> dict[str, Any]:
    """The tree of a published model's config.json. Raises KeyError for a name that no family has."""
    for module in _modules():
        if name in module.NUM_PARAMETERS:
            tree: dict[str, Any] = module.published_config(name)
            return tree
    raise KeyError(name)


def hub_name(name: str) -> str | None:
    """The name on the hub of a published model, named with or without `-Instruct`; None for a name that no family
    has."""
    known = name.removesuffix("-Instruct")
    return next((module.HUB_NAME.format(name=known) for module in _modules() if known in module.NUM_PARAMETERS), None)


def shape_named(name: str) -> ModelShape:
    """The shape of a published model, named with or without `-Instruct`, or of a Hugging Face folder. Raises
    ConfigError when `name` is neither."""
    known = name.removesuffix("-Instruct")
    if known in published_models():
        return ModelShape.from_dict(published_config(known), source=name)
    if (Path(name) / "config.json").is_file():
        return ModelShape.from_folder(name)
    raise ConfigError(f"--model: {name} is none of {', '.join(published_models())}, and no folder with a config.json")


def _modules() -> list[Any]:
    known = [family_named(model_type) for model_type in families()]
    return [family.module("published") for family in known if find_spec(f"{family.package}.published")]
