"""Pixels on their way into a vision tower: patches to where the tower is, and from their values to its width.

The 3-D convolution over patches that do not overlap is one matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor

from megatron_papo.model.norm import replicated_parameter
from megatron_papo.model.shape import VisionShape


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
