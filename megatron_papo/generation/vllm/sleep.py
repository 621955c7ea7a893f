"""The memory of an engine that shares its GPU with the trainer: it is given back while the trainer works, and measured.

vLLM's sleep of level 1: weights go to pinned host memory and come back, keys and values are forgotten. Level 2
(`generation.keep_weights_asleep=false`) forgets the weights too. The certificate compares log-probs after every waking.
Without a GPU there is no sleep: the calls do nothing. Not run yet on a GPU.

Level 2 forgets everything that was made while the model was loaded, not only the weights. It has left models wrong:
Gemma 4 with vision and sound, answers of another model though all weights were read again (NeMo-RL issue 2631), and
rotary embeddings, for which OpenRLHF stays at level 1 (pull request 723). In vLLM 0.26 to 0.32:

- A model's named buffers, the rotary `cos_sin_cache` of language model and vision tower with them, go to host memory
  before and come back with the weights (`Worker.sleep` and `wake_up` in vllm/v1/worker/gpu_worker.py).
- What else a model makes while it is loaded is lost; a family's `engine_vllm` says what its implementation has of it,
  and `refill_zeros` makes it zero again.
- Constants that normalise pixels on the device would be filled at random by dummy loading and are off (versions.py).
- Parameters are written by the hand-over. Whether one is left out is checked: `forget_weights` fills them with NaN, and
  `unwritten` names those that still are.
- Model runner V2 makes its sampler's and its positions' buffers while it loads the model, so they are forgotten too;
  our sampling writes what it reads of them with each request. Counts for penalties, which begin at zero, would be
  lost.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from megatron_papo.generation.vllm.versions import allocators_of

if TYPE_CHECKING:
    from vllm import LLM

_GIB = 1024**3
_WEIGHTS, _KV_CACHE = "weights", "kv_cache"
_CAN_BE_NAN = (torch.float32, torch.bfloat16, torch.float16)
"""Types of the parameters that are checked; in a layer in FP8 only the scales have one of them."""
_kept_allocators: list[Any] = []


class Sleeper:
    """Puts one engine to sleep and wakes it in two parts: its weights for a hand-over, all of it to generate.

    Where it is not `enabled`, every call does nothing.
    """

    def __init__(self, llm: LLM, enabled: bool, keeps_weights: bool = True):
        self._llm, self._enabled, self._level = llm, enabled, 1 if keeps_weights else 2
        self._asleep: set[str] = set()
        self.freed_bytes = 0
        """Bytes of the GPU that the last sleep gave back."""

    @property
    def forgets(self) -> bool:
        """Whether the engine wakes without the weights that it had."""
        return self._enabled and self._level > 1

    def sleep(self) -> None:
        """Gives the engine's memory back; does nothing where it sleeps already."""
        if not self._enabled or self._asleep:
            return
        before, _ = torch.cuda.mem_get_info()
        self._llm.sleep(level=self._level)
        self._asleep = {_WEIGHTS, _KV_CACHE}
        after, _ = torch.cuda.mem_get_info()
        self.freed_bytes = after - before

    def wake_weights(self) -> None:
        """Brings the weights back, for a hand-over; the memory of keys and values stays free until `wake`."""
        self._wake({_WEIGHTS})

    def wake(self) -> None:
        """Brings all of it back, to generate."""
        self._wake({_WEIGHTS, _KV_CACHE})

    def _wake(self, parts: set[str]) -> None:
        for part in sorted(parts & self._asleep, reverse=True):  # the weights first
            if part == _WEIGHTS:
                torch.cuda.empty_cache()  # what the trainer's allocator holds and does not use
            self._llm.wake_up(tags=[part])
            self._asleep.discard(part)


@torch.no_grad()
def forget_weights(model: nn.Module) -> None:
    """Fills every parameter that can be NaN with it, so that `unwritten` shows what a hand-over leaves out."""
    for parameter in model.parameters():
        if parameter.dtype in _CAN_BE_NAN:
            parameter.fill_(torch.nan)


@torch.no_grad()
def refill_zeros(model: nn.Module, names: Sequence[str]) -> None:
    """Fills with zeros what the model had of them when it was loaded: `names` are attributes with lists of tensors.

    Each is filled where it lies, so that CUDA graphs go on reading it.
    """
    for name in names:
        for tensor in getattr(model, name):
            tensor.zero_()


@torch.no_grad()
def unwritten(model: nn.Module) -> list[str]:
    """Names of the parameters that contain NaN after a hand-over."""
    sums = {name: each.sum() for name, each in model.named_parameters() if each.dtype in _CAN_BE_NAN}
    are_nan = torch.stack(list(sums.values())).isnan().tolist()  # one copy to the host for all
    return [name for name, is_nan in zip(sums, are_nan) if is_nan]


def keep_allocators() -> None:
    """Keeps vLLM's allocators from before an engine ends until `free_remains`.

    vLLM drops them as it ends, but its compiled model goes only with the engine object itself; torch knows the
    allocators by pointers that own nothing, and would call them then.
    """
    cumem = _cumem()
    if cumem is not None:
        _kept_allocators.extend(allocators_of(cumem))


def free_remains() -> None:
    """Frees what only the garbage collector reaches, after an engine ended and before the next starts.

    Raises RuntimeError when vLLM's allocator still lists memory, mapped or asleep: it serves one engine a process.
    """
    gc.collect()
    cumem = _cumem()
    if cumem is None:
        return
    gc.collect()  # a model that was compiled becomes garbage only as its engine is collected
    torch.cuda.empty_cache()
    num_bytes = cumem.get_current_usage()
    if num_bytes:
        raise RuntimeError(
            f"the engine that was closed still holds {num_bytes / _GIB:.2f} GiB in {len(cumem.pointer_to_data)} pieces "
            "of vLLM's sleeping memory: something keeps its tensors, and no other engine can start in this process"
        )
    _kept_allocators.clear()


def _cumem() -> Any:
    """vLLM's allocator of memory that can sleep; None where no engine of this process has ever used it."""
    module = sys.modules.get("vllm.device_allocator.cumem")
    return None if module is None else module.CuMemAllocator.instance
