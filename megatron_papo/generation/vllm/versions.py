"""Where vLLM's releases from 0.26 to 0.32 differ for us, each told by looking at the library, never by its number.

One more stands in `vllm_weights.py`: 0.26 asks every backend of its weight transfer for `trainer_send_weights`.
"""

from __future__ import annotations

import dataclasses
from inspect import signature
from typing import Any

_NO_TEMPLATE = "{{ messages[0]['content'] }}"
_IF_KNOWN = {
    # dummy loading would fill the constants of the normalisation at random; 0.26 never normalises on the device
    "mm_device_do_normalize": False,
}


def settings_if_known() -> dict[str, Any]:
    """Arguments of `vllm.LLM` that a release may not have, and then does as they ask."""
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

    known = {field.name for field in dataclasses.fields(EngineArgs)}
    found = {name: value for name, value in _IF_KNOWN.items() if name in known}
    # a release that renders chats does so as it starts, and the folder's own template is not trusted in this process
    return found | ({"chat_template": _NO_TEMPLATE} if "chat_template" in signature(LLM.__init__).parameters else {})


def forget_towers() -> None:
    """0.26 remembers the angles of every size of picture in `functools.lru_cache` around a method of the vision tower,
    which keeps the tower, and so its weights on the GPU, for as long as the process lives; 0.32 in the tower itself."""
    from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VisionTransformer

    forget = getattr(Qwen2_5_VisionTransformer.get_rope_by_thw, "cache_clear", None)
    if forget is not None:
        forget()


def allocators_of(cumem: Any) -> list[Any]:
    """Torch's allocators behind the memory pools of vLLM's `CuMemAllocator`: of a tag 0.26 has one pair of pool and
    allocator, 0.32 a list of such pairs."""
    kept = cumem.allocator_and_pools.values()
    pairs = [pair for each in kept for pair in (each if isinstance(each, list) else [each])]
    return [allocator for _, allocator in pairs]
