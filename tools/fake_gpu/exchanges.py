"""Ranks that are not there: this process is one of a world whose exchanges move nothing.

Groups are made by torch's `fake` backend. Exchanges of tensors are left out, since tensors have no values and results
are allocated by the caller; objects that ranks gather are this rank's own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

_LEFT_OUT = (
    "all_reduce", "broadcast", "reduce_scatter_tensor", "all_gather_into_tensor", "_all_gather_base",
    "_reduce_scatter_base",
)  # fmt: skip
_OF_GRADIENT_BUFFERS = ("dist_reduce_scatter_func", "dist_all_gather_func")


@contextmanager
def world(rank: int, size: int) -> Iterator[None]:
    """Within the block this process is `rank` of `size`. torch.distributed must not have been started."""
    import megatron.core.distributed.param_and_grad_buffer as buffers

    places = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    make_group = dist.new_group

    def new_group(*args: Any, **options: Any) -> Any:
        options.pop("pg_options", None)
        return make_group(*args, **(options | {"backend": "fake"}))

    with ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, {name: str(value) for name, value in places.items()}))
        stack.enter_context(patch.object(dist, "new_group", new_group))
        stack.enter_context(patch.object(dist, "all_gather_object", _own_object))
        for name in _LEFT_OUT:
            stack.enter_context(patch.object(dist, name, _nothing))
        for name in _OF_GRADIENT_BUFFERS:
            stack.enter_context(patch.object(buffers, name, _nothing))
        stack.enter_context(patch.object(buffers, "_coalescing_manager", _coalesced))
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
        yield


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _own_object(gathered: list[Any], value: Any, group: Any = None) -> None:
    gathered[:] = [value] * len(gathered)


@contextmanager
def _coalesced(*_: Any, **__: Any) -> Iterator[Any]:
    yield SimpleNamespace(wait=_nothing)
