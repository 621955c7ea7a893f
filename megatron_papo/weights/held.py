"""The parameters of this rank's part of a model, with their entries in the parameter table.

Layers are counted over the whole model, whatever the pipeline stage. Wrappers (data parallel) are removed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from megatron_papo.model.parameter_map import OUTPUT_LAYER, WORD_EMBEDDINGS, ParameterEntry, parameter_table, table_name
from megatron_papo.model.shape import ModelShape


@dataclass(frozen=True)
class HeldParameter:
    """A parameter on this rank: its shard of the entry's whole parameter."""

    entry: ParameterEntry
    tensor: Tensor
    copy: bool = False
    """Whether this is a repetition: with tied embeddings on several stages the last stage's output layer repeats the
    first stage's word embedding."""


def held_parameters(model: nn.Module, shape: ModelShape, tensor_size: int) -> dict[str, HeldParameter]:
    """The parameters of this rank by Megatron name. Raises ValueError for one that does not fit `shape`."""
    table = parameter_table(shape)
    parameters = {}
    for name, parameter in global_parameters(model).items():
        copy = name == OUTPUT_LAYER and shape.tie_word_embeddings
        entry = table.get(WORD_EMBEDDINGS if copy else name)
        if entry is None:
            raise ValueError(f"{name}: the model has this parameter, the name table does not")
        _check_shard(name, entry, tuple(parameter.shape), tensor_size)
        parameters[name] = HeldParameter(entry, parameter, copy)
    return parameters


def global_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """This rank's parameters by the names of the table. Wrappers are removed, layers count over the whole model."""
    while isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    numbers = {
        name: str(int(module.layer_number) - 1)  # type: ignore[arg-type]
        for name, module in model.named_modules()
        if re.fullmatch(r".*\.layers\.\d+", name)
    }
    return {table_name(_renumbered(name, numbers)): parameter for name, parameter in model.named_parameters()}


def _renumbered(name: str, numbers: Mapping[str, str]) -> str:
    match = re.match(r"(.*\.layers)\.\d+(?=\.)", name)
    return f"{match[1]}.{numbers[match[0]]}{name[match.end() :]}" if match else name


def _check_shard(name: str, entry: ParameterEntry, shape: tuple[int, ...], tensor_size: int) -> None:
    expected = list(entry.shape)
    fits = len(shape) == len(expected)
    if fits and entry.axis is not None:
        fits = shape[entry.axis] * tensor_size >= entry.shape[entry.axis] and shape[entry.axis] % entry.parts == 0
        expected[entry.axis] = shape[entry.axis]
    if not fits or list(shape) != expected:
        raise ValueError(f"{name}: {shape} on {tensor_size} tensor ranks is no shard of {entry.shape}")
