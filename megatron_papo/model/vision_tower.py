"""What the vision towers of all families have in common: what the policy asks of one, and how patches come into it.

The 3-D convolution over patches that do not overlap is one matrix.
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
    """What the policy asks of a vision tower; it lies whole on the first pipeline stage."""

    patch_embed: PatchEmbed
    """The first module, whose weight is where pixels go; `model.freeze.vision` freezes it."""
    decoder: TransformerBlock
    """The transformer layers, which `model.freeze.vision` freezes too."""
    merger: MegatronModule
    """What makes image tokens of patches; `model.freeze.projector` freezes it."""

    def forward(self, pixel_values_PD: Tensor, grid_thw_I3: Tensor) -> Tensor:
        """P patches in the processor's order, of images whose grids count patches (frames, height, width), to
        [M, out_hidden_size] image tokens in reading order, the same on every tensor rank."""
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
    """The patches of several images on the host, each [P, D], end to end where the tower's `weight` is.

    To a GPU they go rounded to the weight's dtype, as `PatchEmbed` would round them there, with nothing but moving of
    whole patches between: half the bytes in bf16. From pinned memory, as `host_copies` has it.
    """
    if not weight.is_cuda:
        return torch.cat(tuple(views))
    sizes = [len(view) for view in views]
    staged_PD = torch.empty(sum(sizes), views[0].shape[1], dtype=weight.dtype, pin_memory=True)
    for place, view in zip(staged_PD.split(sizes), views):
        place.copy_(view)
    return staged_PD.to(weight.device, non_blocking=True)


class PatchEmbed(MegatronModule):
    """A patch's values to the tower's width; whole on every tensor rank."""

    def __init__(self, config: TransformerConfig, shape: VisionShape):
        super().__init__(config)
        size = (shape.hidden_size, shape.patch_dim)
        values = torch.empty(size, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight = replicated_parameter(values, config)

    def forward(self, pixels_PD: Tensor) -> Tensor:
        return F.linear(pixels_PD.to(self.weight.dtype), self.weight)
