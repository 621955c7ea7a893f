"""Host memory that a checkpoint is copied to before it is written, so that training may go on meanwhile.

As large as what this rank writes: its weights (one data-parallel rank's share of them is all of its shard) and its
optimizer state, once more. In fp32 that is 12 bytes a parameter of this rank, with bf16 weights and fp32 masters 14. It
is one piece, which stays from save to save: the first save pays for its pages. Where there is a GPU it is pinned, as it
is: what torch's own `pin_memory` gives for a tensor is as large as the next power of two.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from collections.abc import Mapping
from dataclasses import replace

import torch
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor
from torch import Tensor

from megatron_papo.distributed.accelerator import has_gpu

Place = tuple[str, tuple[int, ...], tuple[int, ...], torch.dtype]
"""Name, offset, shape and dtype of a box."""
_ALIGNMENT = 64
"""Bytes; of every tensor's beginning."""


class Staging:
    def __init__(self) -> None:
        self._memory: HostMemory | None = None
        self._buffers: dict[Place, Tensor] = {}

    @torch.no_grad()
    def copy(self, tree: Mapping[str, ShardedBase]) -> dict[str, ShardedBase]:
        """The same tree, its tensors as they are now, in memory of this object; the last copy is overwritten.

        Returns when every value has arrived.
        """
        places = {name: _place(part) for name, part in tree.items() if isinstance(part, ShardedTensor)}
        if set(places.values()) != self._buffers.keys():
            self._allocate(list(dict.fromkeys(places.values())))
        copied: dict[str, ShardedBase] = {}
        for name, part in tree.items():
            if isinstance(part, ShardedTensor):
                assert part.data is not None
                part = replace(part, data=self._buffers[places[name]].copy_(part.data, non_blocking=True))
            copied[name] = part
        if has_gpu():
            torch.cuda.current_stream().synchronize()
        return copied

    @property
    def num_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def _allocate(self, places: list[Place]) -> None:
        self._buffers, self._memory = {}, None  # gone before there is more
        sizes = [torch.Size(shape).numel() * dtype.itemsize for _, _, shape, dtype in places]
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
        self._memory = HostMemory(starts[-1])
        for place, start in zip(places, starts):
            self._buffers[place] = self._memory.tensor(start, torch.Size(place[2]), place[3])


class HostMemory:
    """Pages of the host; where there is a GPU it copies to them by itself, and the host meanwhile goes on."""

    def __init__(self, num_bytes: int):
        # shared with processes that are forked: private pages would be copied on the next write, away from the GPU's
        self._pages = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
        if has_gpu():
            runtime, address = torch.cuda.cudart(), ctypes.addressof(ctypes.c_char.from_buffer(self._pages))
            torch.cuda.check_error(int(runtime.cudaHostRegister(address, len(self._pages), 0)))
            # pages that come and go at one address would meet the driver's old entry; at the end it forgets them itself
            weakref.finalize(self, runtime.cudaHostUnregister, address).atexit = False

    def tensor(self, start: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Over the bytes from `start` on; keeps the pages for as long as it lives, not their being pinned."""
        if not shape.numel():
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._pages, dtype=dtype, count=shape.numel(), offset=start).view(shape)


def _place(part: ShardedTensor) -> Place:
    assert part.data is not None
    return part.key, tuple(part.global_offset), tuple(part.data.shape), part.dtype
