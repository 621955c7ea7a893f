"""The registry of model families: `model_type` of config.json -> the package with all that is particular to the family.

Nothing else in megatron_papo knows a family by name. A family's package has modules of fixed names; each is imported
when it is first asked for, so that the command line reads shapes and counts costs without torch. A family that is
installed apart from megatron_papo declares itself as an entry point, which every process reads: ranks and workers too,
whether forked, spawned or started on another machine. What a module must have is a protocol beside the shared code that
calls it:

    shape                  `ShapeModule` in model/shape.py                  reads config.json
    parameters             `ParametersModule` in model/parameter_map.py     Hugging Face tensors <-> Megatron parameters
    vision                 `VisionModule` in model/vision_tower.py          builds the vision tower
    positions              `PositionsModule` in model/positions.py          where tokens stand for rotary embeddings
    costs                  `FamilyCosts` in model/layer_costs.py            parameters, FLOPs, saved bytes
    published              model/published_shapes.py; may be missing        published models by name
    transformers_classes   `TransformersModule` in generation/reference_model.py
                                                                            transformers' model, and how it is called
    engine_vllm            `VllmModule` in generation/vllm/family_module.py; may be missing
                                                                            vLLM's model, and how it is observed

What several families share (attention over packed rows, rotary embedding, the head, norms, MLPs) lies beside the
packages, in `model/`. See docs/guides/add_a_model_family.md.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any, Protocol

FAMILIES = {
    "qwen2_5_vl": "megatron_papo.model.qwen2_5_vl",
    "qwen3_vl": "megatron_papo.model.qwen3_vl",
}
"""The families of this package: `model_type` of config.json -> the import path of the family's package."""

ENTRY_POINTS = "megatron_papo.families"
"""The group of entry points in which other distributions declare families: name and value as in `FAMILIES`."""

_registered: dict[str, str] = {}


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


def families() -> dict[str, str]:
    """All known families, as in `FAMILIES`: of this package, of installed distributions, and registered ones.

    Raises ValueError for a `model_type` that two of the first two declare.
    """
    return {**FAMILIES, **installed_families(), **_registered}


@cache
def installed_families() -> dict[str, str]:
    """The families that entry points declare, read once a process: it takes the metadata of every distribution."""
    packages: dict[str, str] = {}
    for point in entry_points(group=ENTRY_POINTS):
        other = {**FAMILIES, **packages}.get(point.name, point.value)
        if other != point.value or point.name in FAMILIES:
            raise ValueError(f"entry points {ENTRY_POINTS}: {point.name}: both {other} and {point.value}")
        packages[point.name] = point.value
    return packages


def register(model_type: str, package: str) -> None:
    """Adds a family to this process and those that it forks, by the import path of its package. Meant for tests and
    notebooks; `ENTRY_POINTS` reaches every process."""
    _registered[model_type] = package


def family_named(model_type: str) -> Family:
    """The family of this `model_type`. Raises KeyError where none is known."""
    return Family(model_type, families()[model_type])


def family_of(shape: HasFamily) -> Family:
    """The family of a model whose shape was read from its config.json."""
    return family_named(shape.model_type)
