"""The MLP of a transformer layer between two given functions, without Megatron-Core's parallel linears."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from megatron_papo.model.mlp import GatedMLP

Linear = Callable[[Tensor], tuple[Tensor, Tensor | None]]


class GatedMLPBetween(GatedMLP):
    """GatedMLP as it is, but for its two linear layers, which are functions."""

    def __init__(self, first: Linear, second: Linear, *, recompute: Any, num_padding: int = 0, fused: bool = False):
        torch.nn.Module.__init__(self)
        self.config: Any = SimpleNamespace(bias_activation_fusion=fused)
        self.linear_fc1, self.linear_fc2 = first, second
        self.recompute, self.num_padding = recompute, num_padding
