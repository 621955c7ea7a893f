"""What a model family is: all that is particular to it, in one folder `model/<family>/`, chosen by `model_type`.

Nothing else in the package knows a family by name. A folder has the modules below, each with the functions of its
protocol; a module is imported when it is first asked for, so that the command line reads shapes and counts costs
without torch. What several families share (attention over packed rows, rotary positions, the head, norms, MLPs) lies
beside the folders, in `model/`. See docs/guides/add_a_model_family.md.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_papo.model.shape import ModelShape

FAMILIES = {"qwen2_5_vl": "megatron_papo.model.qwen2_5_vl"}
"""`model_type` of config.json -> the package of its family. A package elsewhere is added by `register`."""


@dataclass(frozen=True)
class Family:
    """One family, by the package that holds its modules."""

    model_type: str
    package: str

    def module(self, name: str) -> Any:
        return importlib.import_module(f"{self.package}.{name}")


def register(model_type: str, package: str) -> None:
    """Adds a family that lies outside this package, by the import path of its folder."""
    FAMILIES[model_type] = package


def family_named(model_type: str) -> Family:
    """Raises KeyError for a `model_type` that no family has."""
    return Family(model_type, FAMILIES[model_type])


def family_of(shape: ModelShape) -> Family:
    """The family of a model that was read from its config.json."""
    return family_named(shape.model_type)
