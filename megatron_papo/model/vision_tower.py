"""What the vision towers of all families have in common: the interface that the policy uses, and the patch embedding.

The patch embedding, a 3-D convolution over patches that do not overlap, is one matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from megatron_papo.config import Config
from megatron_papo.model.family import family_of
from megatron_papo.model.fp8.switch import Fp8Switch
from megatron_papo.model.norm import replicated_parameter
from megatron_papo.model.shape import ModelShape, VisionShape


class ImageTokens(NamedTuple):
    """What a vision tower makes of the images of a row."""

    tokens_MH: Tensor
    """[M, out_hidden_size] in reading order, the same on every tensor rank: what stands in the row."""
    levels_LM1H: Tensor | None = None
    """[L, M (padded at the end), 1, out_hidden_size]: the tokens of each level of DeepStack, in the same order, under
    sequence parallelism this rank's share of them (`deepstack.py`); None for a tower without it."""


PROJECTOR_MODULES = ("merger", "deepstack_mergers")
"""The modules of a tower that make tokens of patches: its projector, which `model.freeze.projector` freezes. Everything
else is the tower itself."""


def in_projector(name: str) -> bool:
    """Whether the tower's parameter of this name, with or without what stands before `vision.`, is the projector's."""
    return name.rpartition("vision.")[2].partition(".")[0] in PROJECTOR_MODULES


class VisionTower(MegatronModule):
    """The interface of a vision tower. All of it is on the first pipeline stage."""

    patch_embed: PatchEmbed
    """The first module, to whose weight's device pixels are moved."""
    decoder: TransformerBlock
    """The transformer layers."""
    merger: MegatronModule
    """The module that makes image tokens of patches."""

    def forward(self, pixel_values_PD: Tensor, grid_thw_I3: Tensor) -> ImageTokens:
        """The tokens of P patches in the processor's order; the grids are the patches of each image in time, height and
        width."""
        raise NotImplementedError

    def padded_share(self, pixels_PD: Tensor, num_padding: int) -> Tensor:
        """The patches with `num_padding` patches of zeros at the end; under sequence parallelism this rank's share, in
        memory of its own, since a view would keep the pixels of all ranks for backward."""
        pixels_PD = F.pad(pixels_PD, (0, 0, 0, num_padding)) if num_padding else pixels_PD
        return scatter_to_sequence_parallel_region(pixels_PD).clone() if self.config.sequence_parallel else pixels_PD


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

    def __init__(self, config: TransformerConfig, shape: VisionShape, *, bias: bool = False):
        super().__init__(config)
        place = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        self.weight = replicated_parameter(torch.empty(shape.hidden_size, shape.patch_dim, **place), config)
        self.bias = replicated_parameter(torch.zeros(shape.hidden_size, **place), config) if bias else None

    def forward(self, pixels_PD: Tensor) -> Tensor:
        return F.linear(pixels_PD.to(self.weight.dtype), self.weight, self.bias)
