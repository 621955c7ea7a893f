"""The toy family's vision tower under Megatron-Core: full attention within an image, blocks of patches averaged."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from megatron_papo.config import Config
from megatron_papo.model.attention.packed_layout import build_segments
from megatron_papo.model.fp8.switch import Fp8Switch
from megatron_papo.model.layers import block_spec, recompute_in
from megatron_papo.model.norm import LayerNorm, replicated_parameter
from megatron_papo.model.shape import ModelShape, VisionShape
from megatron_papo.model.transformer_config import vision_config
from megatron_papo.model.vision_tower import ImageTokens, PatchEmbed, VisionTower
from megatron_papo.types import Segment


def build_tower(config: Config, shape: ModelShape, spec: str, fp8: Fp8Switch) -> VisionTower:
    """The tower of `shape`; FP8 is not for it."""
    assert not fp8.settings.vision
    return ToyTower(vision_config(config, shape, spec), shape.vision, spec, config.model.recompute)


class ToyTower(VisionTower):
    """Patches in, image tokens out."""

    def __init__(self, config: TransformerConfig, shape: VisionShape, spec: str, recompute: str):
        super().__init__(config)
        self.shape = shape
        self.patch_embed = PatchEmbed(config, shape)
        layers = block_spec(spec, shape.num_layers, shape, causal=False)
        self.decoder = TransformerBlock(config, layers, post_layer_norm=False, post_process=False)
        recompute_in(self.decoder.layers, recompute)
        self.merger = Averaged(config, shape)

    def forward(self, pixel_values_PD: Tensor, grid_thw_I3: Tensor) -> ImageTokens:
        """Patches in the processor's order, block by block, to image tokens in reading order."""
        sequence = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        num_padding = -len(pixel_values_PD) % (self.shape.merge_unit * sequence)
        pixels = self.padded_share(pixel_values_PD.to(self.patch_embed.weight.device), num_padding)
        images = [Segment(length) for length in grid_thw_I3.prod(1).tolist()]
        plan = build_segments(images, causal=False, device=pixels.device, num_padding=num_padding)
        hidden = self.decoder(self.patch_embed(pixels)[:, None, :], attention_mask=None, packed_seq_params=plan)
        return ImageTokens(self.merger(hidden)[: len(pixel_values_PD) // self.shape.merge_unit])


class Averaged(MegatronModule):
    """The mean of the normed patches of a block, times a matrix that every tensor rank holds whole."""

    def __init__(self, config: TransformerConfig, shape: VisionShape):
        super().__init__(config)
        self.merge_unit = shape.merge_unit
        self.norm = LayerNorm(config, shape.hidden_size, shape.norm_eps)
        size = (shape.out_hidden_size, shape.hidden_size)
        values = torch.empty(size, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight = replicated_parameter(values, config)

    def forward(self, hidden_P1H: Tensor) -> Tensor:
        """[P, 1, H] (this rank's share under sequence parallelism) to [M, out] on every rank."""
        blocks = self.norm(hidden_P1H).squeeze(1).unflatten(0, (-1, self.merge_unit)).mean(1)
        tokens = F.linear(blocks, self.weight)
        if self.config.sequence_parallel:
            tokens = gather_from_sequence_parallel_region(tokens, tensor_parallel_output_grad=False)
        return tokens
