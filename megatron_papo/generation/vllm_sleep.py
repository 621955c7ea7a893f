"""The memory of an engine that shares its GPU with the trainer: given back while the trainer works, measured.

vLLM's sleep of level 1: weights go to pinned host memory and come back, keys and values are forgotten. Level 2, which
forgets the weights too, left vision-language models wrong (NeMo-RL issue 2631, OpenRLHF issue 723). The certificate
looks at log-probs after every waking. Without a GPU there is no sleep: the calls do nothing. Not run yet on a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm import LLM

_WEIGHTS, _KV_CACHE = "weights", "kv_cache"


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
