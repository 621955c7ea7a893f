"""Padding at the end of a row, set to zero and kept at zero.

FP8 products need a multiple of tokens, sequence parallelism needs shares of one length (`multiples.py`). What is added
at the end is zero before the first layer and stays zero in every input and gradient of a linear layer: attention leaves
it out, and where a layer has biases (in a vision tower) it is set to zero again. So no maximum, loss or gradient sees
it; in other trainers padding that attended made gradients 40 to 500 times too large (TransformerEngine 2911, 2892).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer import TransformerLayer
from torch import Tensor

from megatron_papo.model.attention.packed_layout import Segments, WindowedSegments
from megatron_papo.model.recompute import recipe_of, with_recipe


def zero_end(values: Tensor, num_padding: int, rank: int = 0, num_ranks: int = 1) -> Tensor:
    """`values` [T / num_ranks, ...] with the last `num_padding` of the row's T places set to zero, without gradient.

    `rank`: which of the `num_ranks` shares of the row `values` is.
    """
    size = values.shape[0]
    keep = min(max(size * num_ranks - num_padding - rank * size, 0), size)
    if keep == size:
        return values
    return F.pad(values[:keep], (0, 0) * (values.dim() - 1) + (0, size - keep))


class ZeroPaddedLayer(TransformerLayer):
    """A transformer layer with biases that keeps the padding at the end of a row at zero.

    Biases would fill it in three places: after attention, between the MLP's two linear layers, and after the MLP; norms
    with biases in two more, before attention and before the MLP. Set to zero there, padding is zero in the input of
    every linear layer, and no gradient comes back through it.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._num_padding = 0
        for norm in (self.input_layernorm, self.pre_mlp_layernorm):
            if getattr(norm, "bias", None) is not None:
                norm.register_forward_hook(lambda _, __, normed: self._zeroed_norm(normed))

    def _forward_attention(
        self, hidden_states: Tensor, *args: Any, packed_seq_params: Segments | WindowedSegments, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        # the MLP follows within the same call, also when recomputation repeats the layer in backward
        self._num_padding = packed_seq_params.num_padding
        # within the MLP every rank has all places of the row, under sequence parallelism too
        self.mlp.num_padding = self._num_padding
        hidden, context = super()._forward_attention(
            hidden_states, *args, packed_seq_params=packed_seq_params, **kwargs
        )
        return self._zeroed(hidden), context

    def _forward_mlp(self, *args: Any, **kwargs: Any) -> Any:
        return self._zeroed(super()._forward_mlp(*args, **kwargs))

    def _zeroed_norm(self, normed: Tensor) -> Tensor:
        """A norm's output with zero padding; what computes it again in backward then does both."""
        zero, again = self._zero_padding(), recipe_of(normed)
        zeroed = zero(normed)
        return zeroed if again is None else with_recipe(zeroed, lambda: zero(again()))

    def _zeroed(self, hidden: Tensor) -> Tensor:
        return self._zero_padding()(hidden)

    def _zero_padding(self) -> partial[Tensor]:
        """Sets this rank's share of the current row's padding to zero."""
        if not self.config.sequence_parallel:
            return partial(zero_end, num_padding=self._num_padding)
        rank = parallel_state.get_tensor_model_parallel_rank()
        return partial(
            zero_end, num_padding=self._num_padding, rank=rank, num_ranks=self.config.tensor_model_parallel_size
        )
