"""Follows every operation on a fake GPU: the storages that live there, and the places where the host waits for it.

Tensors have no values, so what depends on values is answered: one number read from the GPU is 1 (or 1.0, or False).
Leaves out what no operation of torch does: the memory of CUDA itself, of libraries and of cached blocks.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_BLOCK = 512
"""Bytes: torch's allocator gives multiples of it."""
_ROOTS = ("megatron_papo", "tools", "megatron/core", "torch/optim", "torch/nn/utils")
"""Files whose lines are named for a wait, the innermost of them."""
_aten = torch.ops.aten
_READS = (_aten._local_scalar_dense.default,)
_SIZES_BY_VALUE = (_aten.nonzero.default, _aten.masked_select.default, _aten._unique2.default)
"""Operations whose result has a size that the host has to ask for."""


class Trace(TorchDispatchMode):
    """Bytes on the GPU by storage, now and at most; and `waits`, how often each line made the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self._live: dict[int, tuple[Any, int]] = {}
        self.now = 0
        self.peak = 0
        self.peak_in = ""
        """The operation that reached it."""
        self.waits: Counter[str] = Counter()
        self.products: Counter[str] = Counter()
        """Products of matrices on the GPU, by the dtypes of their operands."""

    def mark(self) -> int:
        """The peak since the last mark; it counts anew from here."""
        peak, self.peak = self.peak, self.now
        return peak

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Mapping | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _READS:
            if args[0].is_cuda:
                self.wait("read a value")
            return False if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        if func is _aten._pin_memory.default:  # FakeTensorMode has no such memory
            return _aten.clone.default(args[0])
        if func in _SIZES_BY_VALUE and args[0].is_cuda:
            self.wait("asked for a size")
        result = func(*args, **kwargs)
        if how := _blocking_copy(func, args, kwargs, result):
            self.wait(how)
        if func in (_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.mm.dtype):
            operands = [tensor for tensor in args if isinstance(tensor, Tensor)][-2:]
            if operands[0].is_cuda:
                self.products[" x ".join(str(tensor.dtype).removeprefix("torch.") for tensor in operands)] += 1
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type == "cuda":
                self._hold(leaf, str(func))
        return result

    def _hold(self, tensor: Tensor, what: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        size = -(-storage.nbytes() // _BLOCK) * _BLOCK
        self._live[key] = (weakref.ref(storage, lambda _: self._release(key)), size)
        self.now += size
        if self.now > self.peak:
            self.peak, self.peak_in = self.now, what

    def _release(self, key: int) -> None:
        held = self._live.pop(key, None)
        if held is not None:
            self.now -= held[1]

    def wait(self, how: str) -> None:
        """Counts one of the line that is running."""
        self.waits[f"{_line()}: {how}"] += 1


def _blocking_copy(func: Any, args: tuple, kwargs: Mapping[str, Any], result: Any) -> str:
    """How a copy between host and GPU makes the host wait; empty where it does not. What is copied from memory that is
    not pinned waits until it is done, and with it all that the GPU was given before."""
    if func is _aten._to_copy.default:
        source, target, free = args[0], result, kwargs.get("non_blocking", False)
    elif func is _aten.copy_.default:
        target, source, free = args[0], args[1], len(args) > 2 and args[2]
    else:
        return ""
    if source.is_cuda == target.is_cuda or free:
        return ""
    return "copied to the host" if source.is_cuda else "copied from the host"


def _line() -> str:
    """`file:function` of the innermost frame of ours, Megatron-Core's or torch's optimizers."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        for root in _ROOTS:
            if f"/{root}/" in name and not name.endswith("/fake_gpu/tracing.py"):
                return f"{root}/{name.rpartition(f'/{root}/')[2]}:{frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"


@contextmanager
def traced() -> Iterator[Trace]:
    """Within the block tensors have no values, and the GPU's are followed."""
    trace = Trace()

    def number(kind: type) -> Any:
        def read(self: Tensor) -> Any:  # `torch.tensor` of a list of tensors reads them past every mode
            if self.is_cuda:
                trace.wait("read a value")
            return kind(1)

        return read

    def tolist(self: Tensor) -> Any:
        if self.is_cuda:
            trace.wait("read a list")
        return _zeros(tuple(self.shape))

    answers = {"__float__": number(float), "__int__": number(int), "tolist": tolist}
    with FakeTensorMode(allow_non_fake_inputs=True), trace, patch.multiple(FakeTensor, **answers):
        yield trace


def _zeros(shape: tuple[int, ...]) -> Any:
    return [_zeros(shape[1:]) for _ in range(shape[0])] if shape else 0.0
