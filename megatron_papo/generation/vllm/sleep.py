"""The memory of an engine that shares its GPU with the trainer: given back while the trainer works, measured.

vLLM's sleep of level 1: weights go to pinned host memory and come back, keys and values are forgotten. Level 2
(`generation.keep_weights_asleep=false`) forgets the weights too. The certificate looks at log-probs after every waking.
Without a GPU there is no sleep: the calls do nothing. Not run yet on a GPU.

What level 2 forgets is all that was made while the model was loaded, not the weights alone. It left models wrong:
Gemma 4 with vision and sound, answers of another model though all weights were read again (NeMo-RL issue 2631), and
rotary embeddings, for which OpenRLHF stays at level 1 (pull request 723). In vLLM 0.26 to 0.32:

- A model's named buffers, the rotary `cos_sin_cache` of language model and vision tower with them, go to host memory
  before and come back with the weights (`Worker.sleep` and `wake_up` in vllm/v1/worker/gpu_worker.py).
- Qwen2.5-VL keeps no other tensor that it does not compute anew: window indices and angles by size of picture are made
  by the first picture of that size, in memory that does not sleep. So what a Gemma loses this family does not have.
- Constants that normalise pixels on the device would be filled at random by dummy loading and are off (vllm_start.py).
- Parameters are written by the hand-over. That none is left out is looked at: `forget_weights` fills them with NaN, and
  `unwritten` finds what still is.
- Model runner V2 makes its sampler's and its positions' buffers while it loads the model, so they are forgotten too;
  for what we ask, each request writes what it reads of them. Counts for penalties, which begin as zeros, would be lost.
"""

from __future__ import annotations

import gc
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from megatron_papo.generation.vllm.versions import allocators_of

if TYPE_CHECKING:
    from vllm import LLM

_GIB = 1024**3
_WEIGHTS, _KV_CACHE = "weights", "kv_cache"
_CAN_BE_NAN = (torch.float32, torch.bfloat16, torch.float16)
"""Of a layer in FP8 these are the scales."""
_kept_allocators: list[Any] = []


class Sleeper:
    """Puts one engine to sleep and wakes it, in two parts: the weights for a hand-over, all of it to generate."""

    def __init__(self, llm: LLM, enabled: bool, keeps_weights: bool = True):
        self._llm, self._enabled, self._level = llm, enabled, 1 if keeps_weights else 2
        self._asleep: set[str] = set()
        self.freed_bytes = 0
        """Of the GPU, by the last sleep."""

    @property
    def forgets(self) -> bool:
        """Whether it wakes without the weights that it had."""
        return self._enabled and self._level > 1

    def sleep(self) -> None:
        if not self._enabled or self._asleep:
            return
        before, _ = torch.cuda.mem_get_info()
        self._llm.sleep(level=self._level)
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


@torch.no_grad()
def forget_weights(model: nn.Module) -> None:
    """Makes every parameter that can be NaN: what a hand-over then leaves out shows."""
    for parameter in model.parameters():
        if parameter.dtype in _CAN_BE_NAN:
            parameter.fill_(torch.nan)


@torch.no_grad()
def unwritten(model: nn.Module) -> list[str]:
    """Names of parameters that have NaN after a hand-over."""
    sums = {name: each.sum() for name, each in model.named_parameters() if each.dtype in _CAN_BE_NAN}
    are_nan = torch.stack(list(sums.values())).isnan().tolist()  # one copy to the host for all
    return [name for name, is_nan in zip(sums, are_nan) if is_nan]


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
