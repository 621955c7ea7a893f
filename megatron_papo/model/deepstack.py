"""DeepStack: image tokens of several layers of the vision tower, added to hidden states of the language model.

Beside the image tokens that stand in the row, a tower may make more of them, one *level* from each of a few of its own
layers. Level n is added at the places of the image tokens after layer n of the language model, both counted from 0
(arXiv 2406.04334). The first layers may lie on several pipeline stages: what is still to be added travels to the next
stage with the hidden states, in one tensor.

Under sequence parallelism every tensor rank keeps its share of the tokens, all ranks' shares equally long, padding at
the end included; they are gathered for the layer that adds them. Suffixes: L levels, M image tokens, T places of the
row (this rank's share), H width.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerLayer
from torch import Tensor

from megatron_papo.model.attention.packed_layout import Segments


class DeepStackLayer(TransformerLayer):
    """A transformer layer after which the first of the levels that are still to be added is added.

    The levels travel through the layers as Megatron-Core's `context`, which is an argument and a result of each layer.
    So recomputation of whole layers, which sees only those tensors, gives their gradients back too.
    """

    def forward(
        self, *args: Any, packed_seq_params: Segments, context: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states [T, 1, H] with the level `context`[0] added, and the other levels [L, M, 1, H], if any."""
        hidden, _ = super().forward(*args, packed_seq_params=packed_seq_params, **kwargs)
        if context is None:
            return hidden, None
        assert packed_seq_params.image_places_M is not None
        hidden = self._added(hidden, context[0], packed_seq_params.image_places_M)
        return hidden, context[1:] if len(context) > 1 else None

    def _added(self, hidden_T1H: Tensor, level_M1H: Tensor, places_M: Tensor) -> Tensor:
        if not self.config.sequence_parallel:
            return hidden_T1H.index_add(0, places_M, level_M1H[: len(places_M)])
        # each rank uses other tokens, so the gradients of all of them are summed
        tokens_M1H = gather_from_sequence_parallel_region(level_M1H, tensor_parallel_output_grad=True)
        own_M = places_M - parallel_state.get_tensor_model_parallel_rank() * len(hidden_T1H)
        elsewhere_M = (own_M < 0) | (own_M >= len(hidden_T1H))
        # the number of a rank's tokens is not known on the host: those of other ranks are added to place 0 as zeros
        tokens_M1H = tokens_M1H[: len(places_M)].masked_fill(elsewhere_M[:, None, None], 0.0)
        return hidden_T1H.index_add(0, own_M.masked_fill(elsewhere_M, 0), tokens_M1H)


def with_levels(hidden_T1H: Tensor, levels_LM1H: Tensor | None) -> Tensor:
    """What a pipeline stage sends: hidden states, and after them the levels that later stages add."""
    if levels_LM1H is None or not len(levels_LM1H):
        return hidden_T1H
    return torch.cat([hidden_T1H, levels_LM1H.flatten(0, 1)])


def without_levels(received: Tensor, num_places: int, num_levels: int) -> tuple[Tensor, Tensor | None]:
    """The hidden states of `num_places` places and the levels, of what `with_levels` put together. `num_levels`: how
    many are left at this stage; there are none, too, where the row has no image."""
    if len(received) == num_places:
        return received, None
    return received[:num_places], received[num_places:].unflatten(0, (num_levels, -1))
