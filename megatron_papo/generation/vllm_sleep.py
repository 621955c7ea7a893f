"""The memory of an engine that shares its GPU with the trainer: given back while the trainer works, measured.

vLLM's sleep of level 1: weights go to pinned host memory and come back, keys and values are forgotten. Level 2, which
forgets the weights too, left vision-language models wrong (NeMo-RL issue 2631, OpenRLHF issue 723). The certificate
looks at log-probs after every waking. Without a GPU there is no sleep: the calls do nothing. Not run yet on a GPU.
"""

from __future__ import annotations

import gc
import sys
from typing import TYPE_CHECKING, Any

import torch

from megatron_papo.generation.vllm_versions import allocators_of

if TYPE_CHECKING:
    from vllm import LLM

_GIB = 1024**3
_WEIGHTS, _KV_CACHE = "weights", "kv_cache"
_kept_allocators: list[Any] = []


class Sleeper:
    """Puts one engine to sleep and wakes it, in two parts: the weights for a hand-over, all of it to generate."""

    def __init__(self, llm: LLM, enabled: bool):
        self._llm, self._enabled = llm, enabled
        self._asleep: set[str] = set()
        self.freed_bytes = 0
        """Of the GPU, by the last sleep."""

    def sleep(self) -> None:
        if not self._enabled or self._asleep:
            return
        before, _ = torch.cuda.mem_get_info()
        self._llm.sleep(level=1)
        self._asleep = {_WEIGHTS, _KV_CACHE}
        after, _ = torch.cuda.mem_get_info()
        self.freed_bytes = after - before

    def wake_weights(self) -> None:
        """Before a hand-over: keys and values stay away until `wake`."""
        self._wake({_WEIGHTS})

    def wake(self) -> None:
        self._wake({_WEIGHTS, _KV_CACHE})

    def _wake(self, parts: set[str]) -> None:
        for part in sorted(parts & self._asleep, reverse=True):  # the weights first
            if part == _WEIGHTS:
                torch.cuda.empty_cache()  # what the trainer's allocator holds and does not use
            self._llm.wake_up(tags=[part])
            self._asleep.discard(part)


def keep_allocators() -> None:
    """Before an engine ends, until `free_remains`: vLLM drops its allocators as it ends, while its compiled model goes
    only with the engine object itself, and torch, which knows them by pointers that own nothing, then calls them."""
    cumem = _cumem()
    if cumem is not None:
        _kept_allocators.extend(allocators_of(cumem))


def free_remains() -> None:
    """After an engine ended and before the next starts: frees what only the garbage collector reaches.

    Raises RuntimeError when vLLM's allocator still lists memory, mapped or asleep: it serves one engine a process.
    """
    gc.collect()
    cumem = _cumem()
    if cumem is None:
        return
    gc.collect()  # a model that was compiled becomes garbage only as its engine is collected
    torch.cuda.empty_cache()
    left = cumem.get_current_usage()
    if left:
        raise RuntimeError(
            f"the engine that was closed still holds {left / _GIB:.2f} GiB in {len(cumem.pointer_to_data)} pieces of "
            "vLLM's sleeping memory: something keeps its tensors, and no other engine can start in this process"
        )
    _kept_allocators.clear()


def _cumem() -> Any:
    """vLLM's allocator of memory that can sleep; None where no engine of this process ever had any."""
    module = sys.modules.get("vllm.device_allocator.cumem")
    return None if module is None else module.CuMemAllocator.instance
