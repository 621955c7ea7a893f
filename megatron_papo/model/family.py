"""What a model family is: all that is particular to it, in one package, chosen by `model_type` of config.json.

Nothing else in megatron_papo knows a family by name. A family's package has the modules below, each with the functions
of its protocol. A module is imported when it is first asked for, so that the command line reads shapes and counts costs
without torch. What several families share (attention over packed rows, rotary positions, the head, norms, MLPs) lies
beside the packages, in `model/`. See docs/guides/add_a_model_family.md.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

    from megatron_papo.config import Config
    from megatron_papo.files.json_keys import Keys
    from megatron_papo.model.fp8.switch import Fp8Switch
    from megatron_papo.model.parameter_map import ParameterEntry
    from megatron_papo.model.shape import ModelShape

FAMILIES = {"qwen2_5_vl": "megatron_papo.model.qwen2_5_vl"}
"""`model_type` of config.json -> the import path of its family's package. `register` adds one from elsewhere."""


class ShapeModule(Protocol):
    """`shape.py`: reads config.json. Imports no torch."""

    def read_shape(self, root: Keys) -> ModelShape:
        """The shape that the parsed config.json `root` describes. Raises ValueError naming the key at fault."""


class ParametersModule(Protocol):
    """`parameters.py`: the two-way table between Hugging Face tensors and Megatron parameters."""

    EMBEDDING: str
    """Name of the word embedding in published files."""
    HEAD: str
    """Name of the output matrix in published files."""

    def entries(self, shape: ModelShape) -> Iterable[ParameterEntry]:
        """An entry for every parameter, in the model's order, with the names of published files. Tied embeddings have
        no entry for `language.output_layer.weight`."""

    def published_name(self, name: str) -> str:
        """A Hugging Face name as in published files, from any form in which a file may have it."""

    def module_name(self, name: str) -> str:
        """A Hugging Face name as in the state of transformers' model, from any form."""


class VisionTower(Protocol):
    """What the policy asks of a family's vision tower, a MegatronModule on the first pipeline stage."""

    patch_embed: nn.Module
    """Its `weight` is where pixels go, and of what dtype."""
    decoder: nn.Module
    """Its transformer layers; frozen with `patch_embed` by `model.freeze.vision`."""
    merger: nn.Module
    """What makes image tokens of patches; frozen by `model.freeze.projector`."""

    def __call__(self, pixel_values_PD: Tensor, grid_thw_I3: Tensor) -> Tensor:
        """P patches in the processor's order, of images whose grids count patches (frames, height, width), to
        [M, out_hidden_size] image tokens in reading order, the same on every tensor rank."""


class VisionModule(Protocol):
    """`vision.py`: builds the vision tower under Megatron-Core."""

    def build_tower(self, config: Config, shape: ModelShape, spec: str, fp8: Fp8Switch) -> Any:
        """A `VisionTower` that is split over the tensor ranks. `spec`: `local` or `transformer_engine`."""


class PositionsModule(Protocol):
    """`positions.py`: where the tokens of a prompt stand for rotary embeddings."""

    def prompt_positions(self, token_ids_S: Tensor, grid_thw_I3: Tensor | None, shape: ModelShape) -> Tensor:
        """[3, S] int64 positions in time, height and width. A response goes on from their largest value plus one,
        alike in all three. Raises ValueError where image tokens and grids do not match."""


@dataclass(frozen=True)
class Family:
    """One family, by the import path of the package that holds its modules."""

    model_type: str
    package: str

    def module(self, name: str) -> Any:
        """The family's module `name`, imported when it is first asked for."""
        return importlib.import_module(f"{self.package}.{name}")

    @property
    def shape(self) -> ShapeModule:
        """Reads config.json."""
        return self.module("shape")

    @property
    def parameters(self) -> ParametersModule:
        """The table of parameters."""
        return self.module("parameters")

    @property
    def vision(self) -> VisionModule:
        """Builds the vision tower."""
        return self.module("vision")

    @property
    def positions(self) -> PositionsModule:
        """Counts the positions of a prompt."""
        return self.module("positions")


def register(model_type: str, package: str) -> None:
    """Adds a family that lies outside megatron_papo, by the import path of its package."""
    FAMILIES[model_type] = package


def families() -> Sequence[Family]:
    """All families that are registered."""
    return [Family(model_type, package) for model_type, package in FAMILIES.items()]


def family_named(model_type: str) -> Family:
    """The family of this `model_type`. Raises KeyError where none is registered."""
    return Family(model_type, FAMILIES[model_type])


def family_of(shape: ModelShape) -> Family:
    """The family of a model whose shape was read from its config.json."""
    return family_named(shape.model_type)
