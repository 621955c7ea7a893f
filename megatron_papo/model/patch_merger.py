"""The projector of several families: one token of the language model from each block of patches.

A norm, a linear layer to the width of the block, GELU, and a linear layer to the language model's width.
"""

from __future__ import annotations

import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor

from megatron_papo.model.norm import LayerNorm, RMSNorm
from megatron_papo.model.shape import MergerNorms, VisionShape


class PatchMerger(MegatronModule):
    """Makes tokens of the language model's width from blocks of spatial_merge_size x spatial_merge_size patches."""

    def __init__(self, config: TransformerConfig, shape: VisionShape, *, norms: MergerNorms = "patch"):
        """`norms`: what is normed, with the tower's kind of norm."""
        super().__init__(config)
        self.width = shape.hidden_size * shape.merge_unit
        self.norm_width = shape.hidden_size if norms == "patch" else self.width
        kind = RMSNorm if shape.norm == "rms" else LayerNorm
        self.norm = kind(config, self.norm_width, shape.norm_eps)
        self.linear_fc1 = ColumnParallelLinear(
            self.width, self.width, config=config, init_method=config.init_method, bias=True
        )
        self.linear_fc2 = RowParallelLinear(
            self.width,
            shape.out_hidden_size,
            config=config,
            init_method=config.init_method,
            bias=True,
            input_is_parallel=True,
            skip_bias_add=False,
        )

    def forward(self, hidden_P1H: Tensor) -> Tensor:
        """Tokens [M, 1, out] of patches [P, 1, H]; under sequence parallelism of and for this rank's share."""
        blocks = self.norm(hidden_P1H.reshape(-1, 1, self.norm_width)).reshape(-1, 1, self.width)
        inner, _ = self.linear_fc1(blocks)
        tokens, _ = self.linear_fc2(F.gelu(inner))
        return tokens

    def on_every_rank(self, hidden_P1H: Tensor) -> Tensor:
        """The same tokens, [M, out], those of all ranks on every rank."""
        tokens = self(hidden_P1H)
        if self.config.sequence_parallel:
            # all ranks continue with the same tokens, so each takes its slice of the gradient
            tokens = gather_from_sequence_parallel_region(tokens, tensor_parallel_output_grad=False)
        return tokens.squeeze(1)
