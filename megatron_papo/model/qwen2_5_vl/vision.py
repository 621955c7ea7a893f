"""The vision tower of Qwen2.5-VL under tensor and sequence parallelism: patches in, image tokens out.

The tower has a patch embedding (the 3-D convolution over non-overlapping patches is one matrix), transformer layers
that attend within windows or whole frames, and the merger that makes one token of each block of patches. Patches are
padded at the end, so that no block is split between sequence-parallel ranks.
"""

from __future__ import annotations

from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from megatron_papo.config import Config
from megatron_papo.model.fp8.multiples import patch_multiple
from megatron_papo.model.fp8.switch import Fp8Switch
from megatron_papo.model.fusions import of_plain_linears
from megatron_papo.model.layers import block_spec, recompute_in
from megatron_papo.model.patch_merger import PatchMerger
from megatron_papo.model.qwen2_5_vl.patches import plan_patches
from megatron_papo.model.qwen2_5_vl.shape import WindowedVisionShape
from megatron_papo.model.shape import ModelShape
from megatron_papo.model.transformer_config import vision_config
from megatron_papo.model.vision_tower import ImageTokens, PatchEmbed, VisionTower


def build_tower(config: Config, shape: ModelShape, spec: str, fp8: Fp8Switch) -> WindowedTower:
    """The tower of `shape` under these settings; `spec` is `local` or `transformer_engine`."""
    assert isinstance(shape.vision, WindowedVisionShape)
    return WindowedTower(vision_config(config, shape, spec), shape.vision, spec, fp8, config.model.recompute)


class WindowedTower(VisionTower):
    """The vision tower, most of whose layers attend within windows."""

    def __init__(
        self, config: TransformerConfig, shape: WindowedVisionShape, spec: str, fp8: Fp8Switch, recompute: str = "none"
    ):
        super().__init__(config)
        self.shape, self.fp8 = shape, fp8
        self.patch_embed = PatchEmbed(config, shape)
        self.decoder = TransformerBlock(
            config, block_spec(spec, shape.num_layers, shape, causal=False), post_layer_norm=False, post_process=False
        )
        recompute_in(self.decoder.layers, recompute)
        self.merger = PatchMerger(of_plain_linears(config), shape)
        if fp8.settings.vision:
            fp8.take("vision", self.decoder.layers, config, skip=frozenset())

    def forward(self, pixel_values_PD: Tensor, grid_thw_I3: Tensor) -> ImageTokens:
        """Image tokens in reading order, on every rank, of patches in the processor's order."""
        weight = self.patch_embed.weight
        sequence_ranks = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        recipe = self.fp8.recipe if self.fp8.settings.vision else "off"
        multiple = patch_multiple(recipe, sequence_ranks, self.shape.merge_unit)
        plan = plan_patches(grid_thw_I3, self.shape, multiple=multiple, device=weight.device)
        pixels = pixel_values_PD.to(weight.device).index_select(0, plan.patch_order_P)
        hidden = self.decoder(
            self.patch_embed(self.padded_share(pixels, plan.num_padding))[:, None, :],
            attention_mask=None,
            packed_seq_params=plan.segments,
        )
        return ImageTokens(self.merger.on_every_rank(hidden).index_select(0, plan.token_order_M))
