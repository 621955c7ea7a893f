"""Host memory that a checkpoint is copied to before it is written, so that training may continue meanwhile.

It is as large as what this rank writes: its weights and its optimizer state. The weights count on one data-parallel
rank alone, which writes its whole shard. In fp32 that is 12 bytes a parameter of this rank, with bf16 weights and fp32
masters 14. It is a single piece of memory, which is kept from save to save, so that only the first save pays for its
pages. Where there is a GPU these pages are pinned in place: torch's own `pin_memory` rounds the size of a tensor up to
the next power of two.
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
"""The name, offset, shape and dtype of a box."""
_ALIGNMENT = 64
"""Every tensor begins at a multiple of so many bytes."""


class Staging:
    """Memory for a copy of the boxes that this rank writes; each copy overwrites the last one."""

    def __init__(self) -> None:
        self._memory: HostMemory | None = None
        self._buffers: dict[Place, Tensor] = {}

    @torch.no_grad()
    def copy(self, tree: Mapping[str, ShardedBase]) -> dict[str, ShardedBase]:
        """A copy of `tree` whose tensors, with their values of now, lie in this memory. Returns when all values are
        copied."""
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

    def _allocate(self, places: list[Place]) -> None:
        self._buffers, self._memory = {}, None  # freed before more is allocated
        sizes = [torch.Size(shape).numel() * dtype.itemsize for _, _, shape, dtype in places]
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
        self._memory = HostMemory(starts[-1])
        for place, start in zip(places, starts):
            self._buffers[place] = self._memory.tensor(start, torch.Size(place[2]), place[3])


class HostMemory:
    """Pages of the host's memory. Where there is a GPU they are pinned: it copies to them while the host works on."""

    def __init__(self, num_bytes: int):
        # shared with processes that are forked: private pages would be copied on the next write, away from the GPU's
        self._pages = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
        if has_gpu():
            runtime, address = torch.cuda.cudart(), ctypes.addressof(ctypes.c_char.from_buffer(self._pages))
            torch.cuda.check_error(int(runtime.cudaHostRegister(address, len(self._pages), 0)))
            # pages that come and go at one address would meet the driver's old entry; at the end it forgets them itself
            weakref.finalize(self, runtime.cudaHostUnregister, address).atexit = False

    def tensor(self, start: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """A tensor over the bytes from `start` on. It keeps the pages alive, but does not keep them pinned."""
        if not shape.numel():
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._pages, dtype=dtype, count=shape.numel(), offset=start).view(shape)


def _place(part: ShardedTensor) -> Place:
    assert part.data is not None
    return part.key, tuple(part.global_offset), tuple(part.data.shape), part.dtype
