"""Memory that ran out, on the GPU or on the host: recognised, and said with the stage, the row and what helps.

A stage (observe/clock.py) turns such an error into an OutOfMemoryError, which says everything in one line; the error
itself stays its cause, for the traceback in the file. A process that the kernel killed for want of memory says nothing
itself: the kernel's own counter is what tells of it. Imports the standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

Place = Literal["gpu", "host"]

_GPU_TYPE = "OutOfMemoryError"
_GPU_WORDS = (
    "cuda out of memory",
    "cuda error: out of memory",
    "cublas_status_alloc_failed",
    "no available memory for the cache blocks",
    "free memory on device",  # vLLM, with less than its share of the GPU free
)
_HOST_WORDS = ("defaultcpuallocator", "cannot allocate memory")
_GENERATE = ("a smaller generation.gpu_memory_fraction or generation.kv_cache_gib", "a larger generation.tensor")
_SCORE = ("a smaller train.tokens_per_micro_batch", "a larger parallel.tensor")
_LOAD = ("a larger parallel.tensor or parallel.pipeline", "parallel.distributed_optimizer=true")
HOST_HELP = ("checkpoint.asynchronous=false, which copies the state before it writes it", "data.prefetch=false")
HELP = {
    "generate": _GENERATE,
    "evaluate": _GENERATE,
    "answer": _GENERATE,
    "hand_over": ("a smaller generation.bucket_mib", "a smaller generation.gpu_memory_fraction"),
    "score": _SCORE,
    "certify": _SCORE,
    "update": ("a smaller train.tokens_per_micro_batch", "model.recompute=full"),
    "load": _LOAD,
    "resume": _LOAD,
    "set_up": ("optim.precision_aware=true or optim.offload_fraction", "a smaller generation.gpu_memory_fraction"),
}
"""Innermost stage -> the two changes of settings that help most where a GPU runs out of memory in it."""
_ELSEWHERE = ("a smaller train.tokens_per_micro_batch", "a smaller generation.gpu_memory_fraction")
_MOST_LETTERS = 240
_PAGE = "docs/troubleshooting.md#out-of-memory"


class OutOfMemoryError(ValueError):
    """A stage asked for more memory than there is. It bears the name of torch's error, so that whoever reads the note
    of a failure (a supervisor, which does not try again) finds one name for both."""


def place_of(error: BaseException) -> Place | None:
    """Where memory ran out, by the types and wordings of `error` and its causes; None for any other error."""
    cause: BaseException | None = error
    while cause is not None:
        text = str(cause).lower()
        named = any(base.__name__ == _GPU_TYPE for base in type(cause).__mro__)
        if named or any(words in text for words in _GPU_WORDS):
            return "gpu"
        if isinstance(cause, MemoryError) or any(words in text for words in _HOST_WORDS):
            return "host"
        cause = cause.__cause__
    return None


def told(error: BaseException, stage: str, numbers: Callable[[], str]) -> OutOfMemoryError | None:
    """What to raise in place of `error`, which ended the stage `stage` (`outer/inner`); None where it has nothing to do
    with memory, or says all of this already. `numbers`: what the GPU's allocator holds, or empty. Notes of the error,
    such as the row that was worked on, are taken over."""
    place = None if isinstance(error, OutOfMemoryError) else place_of(error)
    if place is None:
        return None
    at = ", ".join([f"stage {stage}", *getattr(error, "__notes__", [])])
    held = numbers() if place == "gpu" else ""
    remedies = HELP.get(stage.rpartition("/")[2], _ELSEWHERE) if place == "gpu" else HOST_HELP
    return OutOfMemoryError("; ".join([f"{at}: {_reason(error)}", *([held] if held else []), _helps(remedies)]))


def _helps(remedies: tuple[str, str]) -> str:
    return f"what helps most: {remedies[0]}, or {remedies[1]} ({_PAGE})"


def _reason(error: BaseException) -> str:
    """The error's own words on memory, in one line and without what it advises."""
    words = (*_GPU_WORDS, *_HOST_WORDS, "out of memory")
    lines = [line.strip() for line in str(error).splitlines() if any(word in line.lower() for word in words)]
    text = re.sub(r" (If reserved|See documentation|Including non-PyTorch).*", "", lines[0]) if lines else ""
    return (text or f"{type(error).__name__}: out of memory")[:_MOST_LETTERS].rstrip(". ")


def kernel_kills() -> int | None:
    """How many processes of this machine the kernel has killed for want of memory since it started; None where it does
    not say."""
    try:
        fields = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
        return int(fields["oom_kill"])
    except (OSError, ValueError, KeyError):
        return None


def why_killed(before: int | None) -> str:
    """What is known of a rank that SIGKILL ended; `before`: `kernel_kills` when it started."""
    now = kernel_kills()
    if before is None or now is None:
        return "by signal SIGKILL (host memory may have run out)"
    if now == before:
        return "by signal SIGKILL, not by the kernel for want of memory"
    return f"by signal SIGKILL, probably by the kernel: host memory ran out; {_helps(HOST_HELP)}"
