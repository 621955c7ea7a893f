"""The vision-language model of this pipeline stage, and its head: log-probs of the response tokens of a packed row.

The first stage makes the embeddings and puts the vision tower's image tokens in their places. The last stage makes
log-probs over the vocabulary shards from the hidden states that predict response tokens; the full logits of a row are
never computed. Banned ids (vision tokens, padding of the vocabulary) have probability zero, as in the engine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor

from megatron_papo.config import Config, FreezeConfig
from megatron_papo.distributed.accelerator import has_gpu, parameter_dtype
from megatron_papo.distributed.layout import layout
from megatron_papo.logprobs import check_targets, vocab_parallel_head
from megatron_papo.model.attention.varlen import check_heads
from megatron_papo.model.fp8.switch import Fp8Switch, check_hardware
from megatron_papo.model.fusions import start_overlap
from megatron_papo.model.initialize import draw_weights, zero_weights
from megatron_papo.model.language import LanguageModel
from megatron_papo.model.layers import choose_spec
from megatron_papo.model.shape import ModelShape, check_layout, stage_layers
from megatron_papo.model.transformer_config import language_config
from megatron_papo.model.vision_tower import VisionTower, build_tower, in_projector, pixels_beside
from megatron_papo.types import HeadOutputs, MicroBatch


@dataclass(frozen=True)
class HeadRequest:
    """What the head computes for the response tokens of a row, beside their log-probs."""

    temperature: float = 1.0
    full_entropy: bool = False
    """Whether to compute the entropy over the whole vocabulary, for each view in the row."""
    full_kl: bool = False
    """Whether to compute the KL between the two views of a joint row over the whole vocabulary."""
    banned_ids: tuple[int, ...] | None = None
    """Token ids of probability zero. None: the model's vision tokens. Empty: none, for the log-probs of a plain
    model."""


class VisionLanguageModel(MegatronModule):
    """The part of a vision-language model that lies on this pipeline stage, with its head on the last."""

    def __init__(
        self, config: TransformerConfig, shape: ModelShape, language: LanguageModel, vision: VisionTower | None
    ):
        """`vision` is None on all pipeline stages but the first."""
        super().__init__(config)
        self.shape = shape
        self.language = language
        self.vision = vision
        self.fp8 = language.fp8
        # Megatron-Core's schedules, and its sum of tied embeddings' gradients, ask these of the outermost module
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process = language.pre_process, language.post_process
        self.share_embeddings_and_output_weights = language.share_embeddings_and_output_weights

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The weight that embedding and output layer share, where they are tied; Megatron-Core calls this."""
        return self.language.shared_embedding_or_output_weight()

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None] | None) -> None:
        """Sets what the previous stage sent; Megatron's schedules call this before forward."""
        self.language.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def check(self, micro_batch: MicroBatch, head: HeadRequest) -> None:
        """Raises ValueError when a response token of the row is banned or outside the vocabulary. To be called while
        the row is on the host: reading it from a GPU would wait for all the work that the GPU has been given."""
        check_targets(micro_batch.target_ids_R, self.shape.language.vocab_size, self._banned_ids(head))

    def _banned_ids(self, head: HeadRequest) -> tuple[int, ...]:
        return self.shape.vision_token_ids if head.banned_ids is None else head.banned_ids

    def forward(self, micro_batch: MicroBatch, head: HeadRequest) -> Tensor | HeadOutputs:
        """Hidden states for the next stage, or on the last stage the head's outputs for the response tokens. `check`
        must have passed the row."""
        places_M = self._image_places(micro_batch)
        embeddings_TH = levels_LM1H = None
        if self.pre_process:
            embeddings_TH, levels_LM1H = self._embed(micro_batch, places_M)
        hidden = self.language(
            embeddings_TH,
            micro_batch.position_ids_3T,
            micro_batch.segments,
            image_places_M=places_M,
            levels_LM1H=levels_LM1H,
        )
        return self._head(hidden, micro_batch, head) if self.post_process else hidden

    def _image_places(self, micro_batch: MicroBatch) -> Tensor | None:
        """Where the row's image tokens stand, where this stage puts or adds something there."""
        if not micro_batch.pixel_values or not (self.pre_process or self.language.num_adding_layers):
            return None
        # their number is known, since packing has checked it; asking the GPU for it would mean waiting
        assert micro_batch.grid_thw_I3 is not None
        num_tokens = sum(map(math.prod, micro_batch.grid_thw_I3.tolist())) // self.shape.vision.merge_unit
        is_image_T = micro_batch.token_ids_T == self.shape.image_token_id
        return torch.nonzero_static(is_image_T, size=num_tokens).squeeze(1)

    def _embed(self, micro_batch: MicroBatch, places_M: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The row's embeddings [T, H] with the image tokens in their places, and the levels of DeepStack, if any."""
        assert self.vision is not None
        embeddings_TH = self.language.embed(micro_batch.token_ids_T)
        if places_M is None:
            return embeddings_TH + self._untouched_vision(embeddings_TH), None
        assert micro_batch.grid_thw_I3 is not None
        pixels_PD = pixels_beside(self.vision.patch_embed.weight, micro_batch.pixel_values)
        images = self.vision(pixels_PD, micro_batch.grid_thw_I3)
        return embeddings_TH.index_copy(0, places_M, images.tokens_MH), images.levels_LM1H

    def _untouched_vision(self, like: Tensor) -> Tensor:
        """Zero, computed from one block of black patches, so that a row without images too gives the tower's weights a
        gradient: data-parallel ranks whose rows have images would wait for it."""
        assert self.vision is not None
        if not torch.is_grad_enabled() or not any(weight.requires_grad for weight in self.vision.parameters()):
            return like.new_zeros(())
        edge = self.shape.vision.spatial_merge_size
        pixels = like.new_zeros(self.shape.vision.merge_unit, self.shape.vision.patch_dim)
        tokens_MH, levels_LM1H = self.vision(pixels, torch.tensor([[1, edge, edge]]))
        total = tokens_MH.sum() if levels_LM1H is None else tokens_MH.sum() + levels_LM1H.sum()
        return total * 0.0

    def _head(self, hidden: Tensor, micro_batch: MicroBatch, head: HeadRequest) -> HeadOutputs:
        states_TH = self.language.head_input(hidden)[: micro_batch.num_tokens]  # without the padding
        weight_VH = self.language.head_weight()
        masked_index_R = micro_batch.masked_logit_index_R
        values = vocab_parallel_head(
            states_TH.index_select(0, micro_batch.logit_index_R),
            None if masked_index_R is None else states_TH.index_select(0, masked_index_R),
            weight_VH,
            micro_batch.target_ids_R,
            group=self.language.tp_group,
            vocab_start=layout().tensor_rank * weight_VH.shape[0],
            vocab_size=self.shape.language.vocab_size,
            banned_ids=self._banned_ids(head),
            temperature=head.temperature,
            entropy=head.full_entropy,
            kl=head.full_kl and masked_index_R is not None,
        )
        return HeadOutputs(*values)


def build_policy(config: Config, shape: ModelShape) -> VisionLanguageModel:
    """This stage's part of the model, on this rank's device, in `config.model.dtype`; parts frozen as configured.

    Weights are random with `config.model.random_init`, else zero until a loader fills them. The process groups must
    exist already. Raises ConfigError for a layout that the shape does not allow.
    """
    ranks = layout()
    check_layout(config, shape, ranks.world_size)
    graphs = config.model.cuda_graphs
    # sequence parallelism draws from one of Megatron's random streams
    if graphs or not get_cuda_rng_tracker().get_states():
        model_parallel_cuda_manual_seed(config.run.seed, use_cudagraphable_rng=graphs, force_reset_rng=graphs)
    spec = choose_spec(config.model)
    check_hardware(config, spec)
    if has_gpu():
        check_heads(shape, parameter_dtype(config.model.dtype))
    fp8 = Fp8Switch(config.fp8)
    layers = stage_layers(config.parallel, shape)
    first_layer = sum(layers[: ranks.pipeline_rank])
    language = LanguageModel(
        language_config(config, shape, spec),
        shape,
        spec,
        first_layer=first_layer,
        num_layers=layers[ranks.pipeline_rank],
        pre_process=ranks.is_first_stage,
        post_process=ranks.is_last_stage,
        fp8=fp8,
        recompute=config.model.recompute,
        row_length=config.train.tokens_per_micro_batch if config.train.fixed_rows else None,
    )
    start_overlap(config, language.config)
    vision = None
    if ranks.is_first_stage:
        vision = build_tower(config, shape, spec, fp8)
    model = VisionLanguageModel(language.config, shape, language, vision)
    if config.model.random_init:
        draw_weights(model, shape, first_layer=first_layer, tensor_rank=ranks.tensor_rank, seed=config.run.seed)
    else:
        zero_weights(model)
    language.setup_embeddings_and_output_layer()  # so that tied matrices count once
    _freeze(model, config.model.freeze)
    return model


def _freeze(model: VisionLanguageModel, freeze: FreezeConfig) -> None:
    model.language.requires_grad_(not freeze.language)
    if model.vision is not None:
        for name, parameter in model.vision.named_parameters(prefix="vision"):
            parameter.requires_grad_(not (freeze.projector if in_projector(name) else freeze.vision))
