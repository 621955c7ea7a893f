"""What the vision towers of all families have in common: the interface that the policy uses, and the patch embedding.

The patch embedding, a 3-D convolution over patches that do not overlap, is one matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from megatron_papo.config import Config
from megatron_papo.model.family import family_of
from megatron_papo.model.fp8.switch import Fp8Switch
from megatron_papo.model.norm import replicated_parameter
from megatron_papo.model.shape import ModelShape, VisionShape


class VisionTower(MegatronModule):
    """The interface of a vision tower. All of it is on the first pipeline stage."""

    patch_embed: PatchEmbed
    """The first module, to whose weight's device pixels are moved; `model.freeze.vision` freezes it."""
    decoder: TransformerBlock
    """The transformer layers, which `model.freeze.vision` freezes too."""
    merger: MegatronModule
    """The module that makes image tokens of patches; `model.freeze.projector` freezes it."""

    def forward(self, pixel_values_PD: Tensor, grid_thw_I3: Tensor) -> Tensor:
        """Image tokens [M, out_hidden_size] in reading order, the same on every tensor rank, of P patches in the
        processor's order; the grids are the patches of each image in time, height and width."""
        raise NotImplementedError


class VisionModule(Protocol):
    """A family's module `vision`."""

    def build_tower(self, config: Config, shape: ModelShape, spec: str, fp8: Fp8Switch) -> VisionTower:
        """The tower, split over the tensor ranks, with weights that are not set yet; `spec` is `local` or
        `transformer_engine`."""


def build_tower(config: Config, shape: ModelShape, spec: str, fp8: Fp8Switch) -> VisionTower:
    """The vision tower of the family of `shape`, with weights that are not set yet."""
    builder: VisionModule = family_of(shape).module("vision")
    return builder.build_tower(config, shape, spec, fp8)


def pixels_beside(weight: Tensor, views: Sequence[Tensor]) -> Tensor:
    """The patches of several images on the host, each [P, D], laid end to end on the device of the tower's `weight`.

    For a GPU they are rounded to the weight's dtype first, which halves the bytes in bf16. `PatchEmbed` would round
    them in the same way, and until then whole patches are only moved. They are copied from pinned memory, so that the
    host need not wait.
    """
    if not weight.is_cuda:
        return torch.cat(tuple(views))
    sizes = [len(view) for view in views]
    staged_PD = torch.empty(sum(sizes), views[0].shape[1], dtype=weight.dtype, pin_memory=True)
    for place, view in zip(staged_PD.split(sizes), views):
        place.copy_(view)
    return staged_PD.to(weight.device, non_blocking=True)


class PatchEmbed(MegatronModule):
    """The linear map from a patch's values to the tower's width; every tensor rank has all of it."""

    def __init__(self, config: TransformerConfig, shape: VisionShape):
        super().__init__(config)
        size = (shape.hidden_size, shape.patch_dim)
        values = torch.empty(size, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight = replicated_parameter(values, config)

    def forward(self, pixels_PD: Tensor) -> Tensor:
        return F.linear(pixels_PD.to(self.weight.dtype), self.weight)
