"""This pipeline stage's part of the language model, composed of Megatron-Core's blocks.

Embedding on the first stage, decoder layers on each, final norm and output matrix on the last. The head itself
(log-probs of response tokens) is in `policy.py`: full logits of a row are never made.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from megatron_papo.model.attention_layout import build_segments
from megatron_papo.model.fusions import of_plain_linears
from megatron_papo.model.rotary import mrope
from megatron_papo.model.shape import ModelShape, padded
from megatron_papo.model.specs import block_spec
from megatron_papo.types import Segment


class LanguageModel(LanguageModule):
    def __init__(
        self,
        config: TransformerConfig,
        shape: ModelShape,
        spec: str,
        *,
        num_layers: int,
        pre_process: bool,
        post_process: bool,
    ):
        """`num_layers`: decoder layers of this stage."""
        super().__init__(config)
        self.shape, self.pre_process, self.post_process = shape.language, pre_process, post_process
        self.share_embeddings_and_output_weights = shape.tie_word_embeddings
        vocab_size = padded(shape.language.vocab_size, config.tensor_model_parallel_size)
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config, vocab_size, 0, position_embedding_type="rope", scatter_to_sequence_parallel=False
            )
        self.decoder = TransformerBlock(
            config,
            block_spec(spec, num_layers, causal=True),
            pre_process=pre_process,
            post_process=post_process,
        )
        if post_process:
            self.output_layer = ColumnParallelLinear(
                config.hidden_size,
                vocab_size,
                config=of_plain_linears(config),
                init_method=config.init_method,
                bias=False,
                skip_weight_param_allocation=pre_process and self.share_embeddings_and_output_weights,
            )

    def embed(self, token_ids_T: Tensor) -> Tensor:
        """[T, H], whole on every tensor rank."""
        return self.embedding(token_ids_T[None, :], None).squeeze(1)

    def forward(self, embeddings_TH: Tensor | None, position_ids_3T: Tensor, segments: tuple[Segment, ...]) -> Tensor:
        """Hidden states of this stage; under sequence parallelism [T / ranks, 1, H], padded, else [T, 1, H].

        `embeddings_TH` on the first stage only; later stages go on from `set_input_tensor`.
        """
        num_tokens = position_ids_3T.shape[1]
        padding = -num_tokens % self.config.tensor_model_parallel_size if self.config.sequence_parallel else 0
        hidden = None
        if embeddings_TH is not None:
            hidden = F.pad(embeddings_TH, (0, 0, 0, padding))[:, None, :]
            hidden = scatter_to_sequence_parallel_region(hidden) if self.config.sequence_parallel else hidden
        if padding:
            segments = (*segments, Segment(padding))
        rotation = mrope(
            F.pad(position_ids_3T, (0, padding)),
            head_dim=self.shape.head_dim,
            theta=self.shape.rope_theta,
            sections=self.shape.mrope_section,
        )
        return self.decoder(
            hidden,
            attention_mask=None,
            packed_seq_params=build_segments(segments, causal=True, device=position_ids_3T.device, rotation=rotation),
        )

    def head_input(self, hidden: Tensor) -> Tensor:
        """[T (padded), H] on every tensor rank, such that the gradients of the vocabulary shards add up."""
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True).squeeze(1)
        return copy_to_tensor_model_parallel_region(hidden).squeeze(1)

    def head_weight(self) -> Tensor:
        """This rank's rows [V / ranks, H] of the output matrix."""
        if self.share_embeddings_and_output_weights:
            weight = self.shared_embedding_or_output_weight()
        else:
            weight = self.output_layer.weight
        assert isinstance(weight, torch.Tensor)
        return weight

    def set_input_tensor(self, input_tensor: Tensor | None) -> None:
        self.decoder.set_input_tensor(input_tensor)
