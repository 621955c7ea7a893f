"""A transformer layer with biases that keeps the padding at the end of a row at zero.

Biases would fill it: after attention, between the MLP's two linears, and after the MLP. Set to zero in these three
places, padding is zero in the input of every linear, and no gradient comes back through it.
"""

from __future__ import annotations

from typing import Any

from megatron.core import parallel_state
from megatron.core.transformer import TransformerLayer
from torch import Tensor

from megatron_papo.model.attention.packed_layout import Segments, WindowedSegments
from megatron_papo.model.fp8.padding import zero_end


class ZeroPaddedLayer(TransformerLayer):
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._num_padding = 0

    def _forward_attention(
        self, hidden_states: Tensor, *args: Any, packed_seq_params: Segments | WindowedSegments, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        hidden, context = super()._forward_attention(
            hidden_states, *args, packed_seq_params=packed_seq_params, **kwargs
        )
        # the MLP follows within the same call, also when a layer is computed again in backward
        self._num_padding = packed_seq_params.num_padding
        self.mlp.num_padding = self._num_padding  # within it all places are there, under sequence parallelism too
        return self._zeroed(hidden), context

    def _forward_mlp(self, *args: Any, **kwargs: Any) -> Any:
        return self._zeroed(super()._forward_mlp(*args, **kwargs))

    def _zeroed(self, hidden: Tensor) -> Tensor:
        if not self.config.sequence_parallel:
            return zero_end(hidden, self._num_padding)
        rank = parallel_state.get_tensor_model_parallel_rank()
        return zero_end(hidden, self._num_padding, rank, self.config.tensor_model_parallel_size)
