"""This pipeline stage's part of the language model, composed of Megatron-Core's blocks.

The embedding is on the first stage, decoder layers on each, final norm and output matrix on the last. The head itself
(log-probs of response tokens) is in `policy.py`, which never computes the full logits of a row.
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

from megatron_papo.model.attention.packed_layout import build_segments
from megatron_papo.model.attention.rotary import mrope
from megatron_papo.model.deepstack import with_levels, without_levels
from megatron_papo.model.fp8.multiples import row_padding, token_multiple
from megatron_papo.model.fp8.switch import Fp8Switch
from megatron_papo.model.fusions import of_plain_linears
from megatron_papo.model.layers import block_spec, recompute_in
from megatron_papo.model.shape import ModelShape, padded
from megatron_papo.types import Segment


class LanguageModel(LanguageModule):
    """The language model's modules on this pipeline stage."""

    def __init__(
        self,
        config: TransformerConfig,
        shape: ModelShape,
        spec: str,
        *,
        first_layer: int,
        num_layers: int,
        pre_process: bool,
        post_process: bool,
        fp8: Fp8Switch,
        recompute: str = "none",
        row_length: int | None = None,
    ):
        """`num_layers`: decoder layers of this stage, of which `first_layer` is the first (from 0). `recompute`: as in
        the settings. `row_length`: the number of tokens to which every row is padded; None: the least that the layout
        and FP8 need."""
        super().__init__(config)
        self.fp8, self.row_length = fp8, row_length
        self.shape, self.pre_process, self.post_process = shape.language, pre_process, post_process
        self.share_embeddings_and_output_weights = shape.tie_word_embeddings
        vocab_size = padded(shape.language.vocab_size, config.tensor_model_parallel_size)
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config, vocab_size, 0, position_embedding_type="rope", scatter_to_sequence_parallel=False
            )
        # levels of DeepStack that are still to be added at this stage; each of its first layers adds one
        self.num_levels = shape.levels_from(first_layer)
        self.num_adding_layers = min(self.num_levels, num_layers)
        self._received: Tensor | None = None
        self.decoder = TransformerBlock(
            config,
            block_spec(spec, num_layers, shape.language, causal=True, num_adding_layers=self.num_adding_layers),
            pre_process=pre_process,
            post_process=post_process,
        )
        recompute_in(self.decoder.layers, recompute)
        num_all, first, last = shape.language.num_layers, fp8.settings.first_layers, fp8.settings.last_layers
        ends = frozenset((*range(first), *range(num_all - last, num_all)))
        fp8.take("language", self.decoder.layers, config, skip=ends)
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
        """Embeddings [T, H] of the token ids, all of them on every tensor rank."""
        return self.embedding(token_ids_T[None, :], None).squeeze(1)

    def forward(
        self,
        embeddings_TH: Tensor | None,
        position_ids_3T: Tensor,
        segments: tuple[Segment, ...],
        *,
        image_places_M: Tensor | None = None,
        levels_LM1H: Tensor | None = None,
    ) -> Tensor:
        """What this stage sends on: hidden states, padded at the end, [T, 1, H], under sequence parallelism
        [T / ranks, 1, H], and after them the levels of DeepStack that later stages add (`deepstack.with_levels`).

        The first stage takes `embeddings_TH`, and `levels_LM1H` where the row has images; later stages take None and
        continue from `set_input_tensor`. `image_places_M`: where image tokens stand, on every stage that adds to them.
        Padding is zero in every layer (by `ZeroPaddedLayer` where biases would fill it).
        """
        padding = self.num_padding(position_ids_3T.shape[1])
        hidden = None
        if embeddings_TH is not None:
            hidden = F.pad(embeddings_TH, (0, 0, 0, padding))[:, None, :]
            hidden = scatter_to_sequence_parallel_region(hidden) if self.config.sequence_parallel else hidden
        elif self._received is not None:
            sequence_ranks = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
            num_places = (position_ids_3T.shape[1] + padding) // sequence_ranks
            received, levels_LM1H = without_levels(self._received, num_places, self.num_levels)
            self.decoder.set_input_tensor(received)
        rotation = mrope(
            position_ids_3T,
            head_dim=self.shape.head_dim,
            theta=self.shape.rope_theta,
            sections=self.shape.mrope_section,
            interleaved=self.shape.interleaved_mrope,
        )
        outputs = self.decoder(
            hidden,
            attention_mask=None,
            context=levels_LM1H,
            packed_seq_params=build_segments(
                segments,
                causal=True,
                device=position_ids_3T.device,
                rotation=rotation,
                num_padding=padding,
                image_places_M=image_places_M,
            ),
        )
        self.fp8.after_forward(outputs)
        return with_levels(outputs, None if levels_LM1H is None else levels_LM1H[self.num_adding_layers :])

    def num_padding(self, num_tokens: int) -> int:
        """Number of places that are added to a row of `num_tokens` tokens in the current pass."""
        sequence_ranks = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        return row_padding(num_tokens, token_multiple(self.fp8.recipe, sequence_ranks), self.row_length)

    def head_input(self, hidden: Tensor) -> Tensor:
        """Hidden states [T (padded), H] for the head, all of them on every tensor rank. Backward adds up their
        gradients from the shards of the vocabulary."""
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True).squeeze(1)
        return copy_to_tensor_model_parallel_region(hidden).squeeze(1)

    def head_weight(self) -> Tensor:
        """This rank's rows of the output matrix, [V / ranks, H]."""
        if self.share_embeddings_and_output_weights:
            weight = self.shared_embedding_or_output_weight()
        else:
            weight = self.output_layer.weight
        assert isinstance(weight, torch.Tensor)
        return weight

    def set_input_tensor(self, input_tensor: Tensor | None) -> None:
        """Sets what the previous stage sent."""
        self._received = input_tensor
