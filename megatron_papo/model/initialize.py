"""Random weights that do not depend on the layout: TP 2 x PP 2 starts with the same model as a single rank.

Every matrix is drawn whole from a random stream of its own (of the seed and the global name), and each rank takes its
slice. The padding of an FFN or of the vocabulary is zero: with zero weights on both sides it stays zero in training.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from megatron_papo.distributed.layout import layout
from megatron_papo.model.parameter_map import OUTPUT_LAYER, WORD_EMBEDDINGS
from megatron_papo.model.shape import ModelShape


@torch.no_grad()
def zero_weights(model: torch.nn.Module) -> None:
    """Sets norms to one and all other weights to zero, for a loader that then fills in all but the padding."""
    for name, parameter in model.named_parameters():
        parameter.fill_(1.0 if is_norm(name) else 0.0)


@torch.no_grad()
def draw_weights(model: torch.nn.Module, shape: ModelShape, *, first_layer: int, tensor_rank: int, seed: int) -> None:
    """Draws matrices from a normal distribution with the shape's initializer_range; biases become 0, norms 1; in place.

    `first_layer`: global number of this stage's first decoder layer.
    """
    for name, parameter in model.named_parameters():
        if is_norm(name) or parameter.dim() == 1:
            parameter.fill_(1.0 if is_norm(name) else 0.0)
            continue
        whole = _draw(global_name(name, shape, first_layer), parameter, seed, shape.language.initializer_range)
        _zero_padding(name, whole, shape)
        parameter.copy_(_slice(whole, parameter, tensor_rank))


def is_norm(name: str) -> bool:
    """Whether the parameter of this name is the weight of a norm."""
    return name.endswith(("norm.weight", "layer_norm_weight"))


def global_name(name: str, shape: ModelShape, first_layer: int) -> str:
    """The parameter's name in the whole model: decoder layers count from the first stage, tied matrices have one
    name."""
    if name == OUTPUT_LAYER and shape.tie_word_embeddings:
        return WORD_EMBEDDINGS
    prefix = "language.decoder.layers."
    if not name.startswith(prefix):
        return name
    layer, rest = name.removeprefix(prefix).split(".", 1)
    return f"{prefix}{int(layer) + first_layer}.{rest}"


def _parts(parameter: Tensor) -> tuple[int, int, int]:
    """The dimension that is split, the tensor ranks that share it, and the number of matrices joined along it."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return 0, 1, 1
    return parameter.partition_dim, layout().tensor_size, parameter.partition_stride  # type: ignore[attr-defined]


def _draw(name: str, parameter: Tensor, seed: int, std: float) -> Tensor:
    dim, ranks, _ = _parts(parameter)
    size = list(parameter.shape)
    size[dim] *= ranks
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    return torch.empty(size).normal_(0.0, std, generator=generator)


def _zero_padding(name: str, whole: Tensor, shape: ModelShape) -> None:
    part = shape.vision if name.startswith("vision.") else shape.language
    if name.endswith("mlp.linear_fc1.weight"):
        for matrix in whole.chunk(2 if part.mlp == "swiglu" else 1):  # gate and up lie one after the other
            matrix[part.intermediate_size :] = 0.0
    elif name.endswith("mlp.linear_fc2.weight"):
        whole[:, part.intermediate_size :] = 0.0
    elif name in (WORD_EMBEDDINGS, OUTPUT_LAYER):
        whole[shape.language.vocab_size :] = 0.0


def _slice(whole: Tensor, parameter: Tensor, tensor_rank: int) -> Tensor:
    dim, ranks, stride = _parts(parameter)
    if ranks == 1:
        return whole
    return torch.cat([matrix.chunk(ranks, dim)[tensor_rank] for matrix in whole.chunk(stride, dim)], dim)
