"""CUDA or CPU: device, communication backend, random numbers, peak memory; and what Megatron-Core needs without a GPU.

The only file that adapts Megatron-Core to a machine without a GPU. Where CUDA is available nothing is adapted.
On the CPU every request for a CUDA tensor is read as one for a CPU tensor, for the life of the process: Megatron-Core
0.19 asks for `torch.cuda.current_device()` throughout, and offers no other hook.
"""

from __future__ import annotations

import contextlib
import ctypes
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt (malloc.h)."""
_adapted: list[TorchFunctionMode] = []


def has_gpu() -> bool:
    return torch.cuda.is_available()


def device() -> torch.device:
    """Where this rank's tensors live."""
    return torch.device("cuda", torch.cuda.current_device()) if has_gpu() else _CPU


def parameter_dtype(name: str) -> torch.dtype:
    """`float32` or `bfloat16` by name; `auto` is bfloat16 on a GPU and float32 without one."""
    if name == "auto":
        return torch.bfloat16 if has_gpu() else torch.float32
    return getattr(torch, name)


def device_name() -> str | None:
    """What CUDA calls this rank's GPU; None without one."""
    return torch.cuda.get_device_name() if has_gpu() else None


def reset_peak_memory() -> bool:
    """From now on `peak_memory` counts anew. False where it cannot: without a GPU it takes a Linux that allows it."""
    if has_gpu():
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to what is resident now
    except OSError:
        return False
    return True


def peak_memory() -> int:
    """Most bytes held at a time since `reset_peak_memory`, which said True: on the GPU by torch's allocator, without
    one by this process (its resident set, with the freed memory that an adapted process keeps)."""
    if has_gpu():
        return torch.cuda.max_memory_allocated()
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].removesuffix("kB")) * 1024


def allocator_in_words() -> str:
    """What torch's allocator holds of this rank's GPU, in GiB; empty where none has been used, or where a GPU that has
    failed no longer says."""
    if not torch.cuda.is_initialized():
        return ""
    try:
        values = (torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), torch.cuda.mem_get_info()[1])
    except RuntimeError:
        return ""
    allocated, reserved, total = (f"{value / 2**30:.1f}" for value in values)
    return f"torch has {allocated} GiB allocated and {reserved} reserved of {total}"


def wait_for_device() -> None:
    """Until the GPU has done all that this process has asked of it; nothing where none has been used."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


@contextlib.contextmanager
def host_threads(count: int) -> Iterator[None]:
    """Within the block torch computes on the host with `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def backend() -> str:
    """What torch.distributed communicates with."""
    return "nccl" if has_gpu() else "gloo"


def seed_all(seed: int) -> None:
    """Seeds python, numpy, torch and, once the parallel groups exist, Megatron's tensor-parallel streams."""
    import numpy

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    from megatron.core import parallel_state, tensor_parallel

    if parallel_state.model_parallel_is_initialized():
        tensor_parallel.model_parallel_cuda_manual_seed(seed)


def adapt_megatron() -> None:
    """Lets Megatron-Core run on the CPU; does nothing where a GPU is, nor when it was called before."""
    if has_gpu() or _adapted:
        return
    import megatron.core.tensor_parallel.random as megatron_random

    def get_state(*_: Any, **__: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
        torch.set_rng_state(state)

    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU
    cuda.synchronize = _nothing
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state, cuda.set_rng_state = get_state, set_state
    cuda.current_stream = cuda.Stream = _NullStream
    cuda.stream = _no_stream
    megatron_random._get_cuda_rng_state, megatron_random._set_cuda_rng_state = get_state, set_state
    _keep_freed_memory()
    mode = CudaMeansCpu()
    mode.__enter__()
    _adapted.append(mode)


def _keep_freed_memory() -> None:
    """Tensors are allocated from the heap whatever their size, and freed memory stays with the process. Otherwise the C
    library returns every large tensor to the system, and each activation's pages are faulted in anew, every layer."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _no_stream(*_: Any) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


class _NullStream:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    wait_stream = wait_event = synchronize = _nothing


class CudaMeansCpu(TorchFunctionMode):
    """Reads every request for a CUDA tensor as one for a CPU tensor."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # the optimizer and gradient clipping compare this string with "torch.cuda.FloatTensor"
            return func(*args).replace("torch.", "torch.cuda.")
        if kwargs and _means_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": _CPU}
        if func is torch.Tensor.to and len(args) > 1 and isinstance(args[1], str | torch.device):
            args = (args[0], _CPU, *args[2:]) if _means_cuda(args[1]) else args
        return func(*args, **(kwargs or {}))


def _means_cuda(place: Any) -> bool:
    return place is not None and (isinstance(place, int) or torch.device(place).type == "cuda")
