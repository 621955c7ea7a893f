"""The registry of model families: `model_type` of config.json -> the package with all that is particular to the family.

Nothing else in megatron_papo knows a family by name. A family's package has modules of fixed names; each is imported
when it is first asked for, so that the command line reads shapes and counts costs without torch. What a module must
have is a protocol beside the shared code that calls it:

    shape                  `ShapeModule` in model/shape.py                  reads config.json
    parameters             `ParametersModule` in model/parameter_map.py     Hugging Face tensors <-> Megatron parameters
    vision                 `VisionModule` in model/vision_tower.py          builds the vision tower
    positions              `PositionsModule` in model/positions.py          where tokens stand for rotary embeddings
    costs                  `FamilyCosts` in model/layer_costs.py            parameters, FLOPs, saved bytes
    published              model/published_shapes.py; may be missing        published models by name
    transformers_classes   generation/                                      transformers' model, and how it is called

What several families share (attention over packed rows, rotary embedding, the head, norms, MLPs) lies beside the
packages, in `model/`. See docs/guides/add_a_model_family.md.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Protocol

FAMILIES = {"qwen2_5_vl": "megatron_papo.model.qwen2_5_vl"}
"""`model_type` of config.json -> the import path of its family's package. `register` adds one from elsewhere."""


@dataclass(frozen=True)
class Family:
    """One family, by the import path of the package that holds its modules."""

    model_type: str
    package: str

    def module(self, name: str) -> Any:
        """The family's module `name`, imported when it is first asked for."""
        return importlib.import_module(f"{self.package}.{name}")


class HasFamily(Protocol):
    """What belongs to a family: the shape of a model."""

    @property
    def model_type(self) -> str:
        """The family, as config.json names it."""


def register(model_type: str, package: str) -> None:
    """Adds a family that lies outside megatron_papo, by the import path of its package."""
    FAMILIES[model_type] = package


def family_named(model_type: str) -> Family:
    """The family of this `model_type`. Raises KeyError where none is registered."""
    return Family(model_type, FAMILIES[model_type])


def family_of(shape: HasFamily) -> Family:
    """The family of a model whose shape was read from its config.json."""
    return family_named(shape.model_type)
