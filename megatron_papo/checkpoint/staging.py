"""Host memory that a checkpoint is copied to before it is written, so that training may go on meanwhile.

As large as what this rank writes: its weights (one data-parallel rank's share of them is all of its shard) and its
optimizer state, once more. In fp32 that is 12 bytes a parameter of this rank, with bf16 weights and fp32 masters 14. It
is pinned where there is a GPU, which rounds each tensor up to a power of two, and stays allocated from save to save:
the first save pays for its pages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor
from torch import Tensor

from megatron_papo.accelerator import has_gpu

Place = tuple[str, tuple[int, ...], tuple[int, ...], torch.dtype]
"""Name, offset, shape and dtype of a box."""


class Staging:
    def __init__(self) -> None:
        self._buffers: dict[Place, Tensor] = {}

    @torch.no_grad()
    def copy(self, tree: Mapping[str, ShardedBase]) -> dict[str, ShardedBase]:
        """The same tree, its tensors as they are now, in memory of this object; the last copy is overwritten.

        Returns when every value has arrived.
        """
        buffers: dict[Place, Tensor] = {}
        copied: dict[str, ShardedBase] = {}
        for name, part in tree.items():
            if isinstance(part, ShardedTensor):
                assert part.data is not None
                place = (part.key, tuple(part.global_offset), tuple(part.data.shape), part.dtype)
                buffer = self._buffers.get(place)
                if buffer is None:
                    buffer = torch.empty(part.data.shape, dtype=part.dtype, pin_memory=has_gpu())
                buffers[place] = buffer.copy_(part.data, non_blocking=True)
                part = replace(part, data=buffer)
            copied[name] = part
        self._buffers = buffers
        if has_gpu():
            torch.cuda.current_stream().synchronize()
        return copied

    @property
    def num_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers.values())
