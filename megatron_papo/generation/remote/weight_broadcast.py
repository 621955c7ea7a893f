"""Weights from rank 0 of the trainer to all ranks of all separate engines: one broadcast for each bucket of tensors.

They travel in a process group outside the trainer's world and the engines': NCCL where there are GPUs, gloo elsewhere.
What a bucket holds is announced over the channels, so neither side needs to know the other's order of tensors. No rank
holds more of a second model than two buckets.
"""

from __future__ import annotations

import datetime
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_papo.distributed import accelerator
from megatron_papo.generation.remote.messages import BucketMessage

_POLL_S = 0.0005
_TIMEOUT = datetime.timedelta(minutes=5)
"""How long its ranks may take to find each other, and how long one broadcast; a rank that is gone is usually noticed
at once."""


class BroadcastBroken(RuntimeError):
    """A weight broadcast failed: one of its ranks is gone."""


class WeightBroadcast:
    """The process group of a hand-over: rank 0 sends, all others receive."""

    def __init__(self, name: str, store: dist.Store, rank: int, size: int):
        """Waits for the other ranks where the backend does. Raises BroadcastBroken."""
        self.name = name
        self._aborted = threading.Event()
        kind: Any = dist.ProcessGroupNCCL if accelerator.has_gpu() else dist.ProcessGroupGloo
        own = dist.PrefixStore(name, store)
        try:
            self._group: Any = kind(own, rank, size, _TIMEOUT)
        except RuntimeError as error:
            raise BroadcastBroken(f"{name}: {error}") from error

    def abort(self) -> None:
        """Ends this broadcast from any thread: whoever waits in `send` or `receive` gets BroadcastBroken."""
        self._aborted.set()
        if accelerator.has_gpu():
            self._group.abort()  # what waits on the GPU; gloo's broadcast is left to end with the process

    def send(
        self,
        named_tensors: Iterable[tuple[str, Tensor]],
        announce: Callable[[BucketMessage], None],
        dtype: torch.dtype,
        bucket_bytes: int,
    ) -> None:
        """Sends everything, cast to `dtype`, in buckets of at most `bucket_bytes`; a larger tensor has its own bucket.

        `announce` tells the receivers of each bucket. Consumes `named_tensors` to its end whatever happens, for drawing
        from it is a collective; then raises BroadcastBroken if a broadcast failed.
        """
        pending: tuple[dist.Work, Tensor] | None = None
        broken: BroadcastBroken | None = None
        for names, tensors in _buckets(named_tensors, dtype, bucket_bytes):
            if broken is not None:
                continue
            announce(BucketMessage(tuple(names), tuple(tuple(tensor.shape) for tensor in tensors), dtype))
            flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
            try:
                work = self._broadcast(flat)
                self._finish(pending)
                pending = work, flat
            except RuntimeError as error:
                broken = BroadcastBroken(str(error))
        if broken is not None:
            raise broken
        try:
            self._finish(pending)
        except RuntimeError as error:
            raise BroadcastBroken(str(error)) from error

    def receive(self, bucket: BucketMessage) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a bucket, views of one new buffer on this rank's device. Raises BroadcastBroken."""
        sizes = [math.prod(shape) for shape in bucket.shapes]
        flat = torch.empty(sum(sizes), dtype=bucket.dtype, device=accelerator.device())
        try:
            self._finish((self._broadcast(flat), flat))
        except RuntimeError as error:
            raise BroadcastBroken(str(error)) from error
        for name, shape, part in zip(bucket.names, bucket.shapes, flat.split(sizes)):
            yield name, part.view(shape)

    def _broadcast(self, flat: Tensor) -> dist.Work:
        return self._group.broadcast(flat.view(torch.uint8), 0)  # as bytes, which every backend can send

    def _finish(self, pending: tuple[dist.Work, Tensor] | None) -> None:
        """Waits by polling: gloo's own waiting cannot be ended from outside."""
        if pending is None:
            return
        while not pending[0].is_completed():
            if self._aborted.wait(_POLL_S):
                raise BroadcastBroken(f"{self.name}: a rank is gone")
        pending[0].wait()


def _buckets(
    named_tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, bucket_bytes: int
) -> Iterator[tuple[list[str], list[Tensor]]]:
    names: list[str] = []
    tensors: list[Tensor] = []
    size = 0
    for name, tensor in named_tensors:
        num_bytes = tensor.numel() * dtype.itemsize
        if tensors and size + num_bytes > bucket_bytes:
            yield names, tensors
            names, tensors, size = [], [], 0
        names.append(name)
        tensors.append(tensor.detach().to(dtype))
        size += num_bytes
    if tensors:
        yield names, tensors
