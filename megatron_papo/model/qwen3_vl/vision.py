"""The vision tower of Qwen3-VL under tensor and sequence parallelism: patches in, image tokens of every level out.

The tower has a patch embedding (the 3-D convolution over non-overlapping patches is one matrix, with a bias), learned
position embeddings interpolated to each image's grid, transformer layers that attend within whole frames, the merger
that makes one token of each block of patches, and for each level of DeepStack a merger of its own, which reads the
patches after an earlier layer. Patches are padded at the end, so that no block is split between sequence-parallel
ranks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from megatron_papo.config import Config
from megatron_papo.distributed.layout import layout
from megatron_papo.model.fp8.multiples import patch_multiple
from megatron_papo.model.fp8.padding import zero_end
from megatron_papo.model.fp8.switch import Fp8Switch
from megatron_papo.model.fusions import of_plain_linears
from megatron_papo.model.layers import block_spec, recompute_in
from megatron_papo.model.norm import replicated_parameter
from megatron_papo.model.patch_merger import PatchMerger
from megatron_papo.model.qwen3_vl.patches import plan_patches
from megatron_papo.model.qwen3_vl.shape import InterpolatedVisionShape
from megatron_papo.model.shape import ModelShape
from megatron_papo.model.transformer_config import vision_config
from megatron_papo.model.vision_tower import ImageTokens, PatchEmbed, VisionTower


def build_tower(config: Config, shape: ModelShape, spec: str, fp8: Fp8Switch) -> DeepStackTower:
    """The tower of `shape` under these settings; `spec` is `local` or `transformer_engine`."""
    assert isinstance(shape.vision, InterpolatedVisionShape)
    return DeepStackTower(vision_config(config, shape, spec), shape.vision, spec, fp8, config.model.recompute)


class DeepStackTower(VisionTower):
    """The vision tower, several of whose layers are made into image tokens."""

    def __init__(
        self,
        config: TransformerConfig,
        shape: InterpolatedVisionShape,
        spec: str,
        fp8: Fp8Switch,
        recompute: str = "none",
    ):
        super().__init__(config)
        self.shape, self.fp8 = shape, fp8
        self.patch_embed = PatchEmbed(config, shape, bias=True)
        self.position_embed = PositionEmbed(config, shape)
        self.decoder = TransformerBlock(
            config, block_spec(spec, shape.num_layers, shape, causal=False), post_layer_norm=False, post_process=False
        )
        recompute_in(self.decoder.layers, recompute)
        plain = of_plain_linears(config)
        self.merger = PatchMerger(plain, shape)
        self.deepstack_mergers = torch.nn.ModuleList(
            PatchMerger(plain, shape, norms="block") for _ in shape.deepstack_layers
        )
        if fp8.settings.vision:
            fp8.take("vision", self.decoder.layers, config, skip=frozenset())

    def forward(self, pixel_values_PD: Tensor, grid_thw_I3: Tensor) -> ImageTokens:
        """Image tokens of patches in the processor's order; levels of DeepStack in the order of their layers."""
        sequence_ranks = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        recipe = self.fp8.recipe if self.fp8.settings.vision else "off"
        multiple = patch_multiple(recipe, sequence_ranks, self.shape.merge_unit)
        device = self.patch_embed.weight.device
        plan = plan_patches(grid_thw_I3, self.shape, multiple=multiple, device=device)
        num_tokens = len(pixel_values_PD) // self.shape.merge_unit
        corners, shares = plan.corners_P4, plan.shares_P4
        rank = layout().tensor_rank if self.config.sequence_parallel else 0
        if self.config.sequence_parallel:
            corners, shares = (part.chunk(sequence_ranks)[rank] for part in (corners, shares))
        patches = self.patch_embed(self.padded_share(pixel_values_PD.to(device), plan.num_padding))
        patches = patches + self.position_embed(corners, shares).to(patches.dtype)
        patches = zero_end(patches, plan.num_padding, rank, sequence_ranks)  # which the bias has filled
        hidden = self.decoder(
            patches[:, None, :],
            attention_mask=None,
            packed_seq_params=plan.segments,
            extract_layer_indices=set(self.shape.deepstack_layers),
        )
        if not self.deepstack_mergers:
            return ImageTokens(self.merger.on_every_rank(hidden)[:num_tokens])
        hidden, extracted = hidden
        levels = [merger(each) for merger, each in zip(self.deepstack_mergers, extracted, strict=True)]
        return ImageTokens(self.merger.on_every_rank(hidden)[:num_tokens], torch.stack(levels))


class PositionEmbed(MegatronModule):
    """The learned position embeddings, whole on every tensor rank."""

    def __init__(self, config: TransformerConfig, shape: InterpolatedVisionShape):
        super().__init__(config)
        place = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        self.weight = replicated_parameter(torch.empty(shape.position_edge**2, shape.hidden_size, **place), config)

    def forward(self, corners_P4: Tensor, shares_P4: Tensor) -> Tensor:
        """The interpolated embeddings [P, H] in fp32, one corner after the other: all four at once would be the largest
        tensor of the tower."""
        first, *others = (
            F.embedding(corners_P, self.weight) * shares_P[:, None]
            for corners_P, shares_P in zip(corners_P4.unbind(1), shares_P4.unbind(1))
        )
        return sum(others, start=first)
