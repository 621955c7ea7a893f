"""The workers of one conversion among themselves: one alone, or ranks that a launcher started.

They move no tensors between them, only what each has done. Needs no Megatron: a gloo group and its key-value store.
"""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_papo.distributed.rendezvous import world_store

_TIMEOUT = datetime.timedelta(days=7)
"""Workers wait for the slowest; one that is gone is noticed at once."""
_POLL_S = 0.2

Found = TypeVar("Found")


def reason_of(error: ValueError | OSError) -> str:
    """In a line: of an OSError its file and what the system says."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


class Workers:
    """This worker among `size`. Use it as a context."""

    def __init__(self) -> None:
        self.rank, self.size = 0, 1
        self._bytes = 0
        self._store: Any = None
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            self._store = world_store(_TIMEOUT.total_seconds())
            dist.init_process_group(
                "gloo", store=dist.PrefixStore("gloo", self._store), rank=self.rank, world_size=self.size,
                timeout=_TIMEOUT,
            )  # fmt: skip

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._store is not None and kind is None:
            dist.barrier()
            dist.destroy_process_group()

    def gather(self, value: Found) -> list[Found]:
        """Every worker's value, by rank, for all."""
        if self._store is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def first(self, work: Callable[[], Found]) -> Found:
        """What rank 0 makes of `work`, for all; a ValueError or OSError of it is everyone's."""
        found: tuple[Any, str | None] = (None, None)
        if self.rank == 0:
            try:
                found = (work(), None)
            except (ValueError, OSError) as error:
                found = (None, reason_of(error))
        value, fault = self.gather(found)[0]
        if fault is not None:
            raise ValueError(fault)
        return value

    def fail(self, reason: str) -> None:
        """Lets the others end with this worker's reason, at their next `advance`."""
        if self._store is not None:
            self._store.set("reason", reason)
            self._store.add("failed", 1)

    def advance(self, num_bytes: int) -> int:
        """Counts bytes that this worker has done; those of all. Raises ValueError once a worker has failed."""
        if self._store is not None:
            if self._store.add("failed", 0):
                raise ValueError(self._store.get("reason").decode())
            return self._store.add("bytes", num_bytes)
        self._bytes += num_bytes
        return self._bytes

    def wait_for_all(self, meanwhile: Callable[[], None]) -> None:
        """Until every worker is here."""
        if self._store is None:
            return
        arrival = dist.barrier(async_op=True)
        assert arrival is not None
        while not arrival.is_completed():
            meanwhile()
            time.sleep(_POLL_S)
        arrival.wait()
