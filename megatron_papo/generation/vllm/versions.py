"""Where vLLM's releases from 0.26 to 0.32 differ for us, each detected by looking at the library, never by its number.

One more stands in `weight_transfer.py`: 0.26 asks every backend of its weight transfer for `trainer_send_weights`.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Iterable
from functools import reduce
from inspect import signature
from typing import Any

from megatron_papo.model.family import Family

_NO_TEMPLATE = "{{ messages[0]['content'] }}"
_IF_KNOWN = {
    # dummy loading would fill the constants of the normalisation at random; 0.26 never normalises on the device
    "mm_device_do_normalize": False,
}


def settings_if_known() -> dict[str, Any]:
    """Arguments of `vllm.LLM` that not every release has; those without them behave as the arguments ask."""
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

    known = {field.name for field in dataclasses.fields(EngineArgs)}
    settings = {name: value for name, value in _IF_KNOWN.items() if name in known}
    # a release that renders chats does so as it starts, and the folder's own template is not trusted in this process
    return settings | ({"chat_template": _NO_TEMPLATE} if "chat_template" in signature(LLM.__init__).parameters else {})


def classes_in_vllm(family: Family) -> Any:
    """The family's module `engine_vllm`. Raises ValueError for a family without one."""
    if importlib.util.find_spec(f"{family.package}.engine_vllm") is None:
        raise ValueError(f"generation.engine=vllm: nothing is known of vLLM's implementation of {family.model_type}")
    return family.module("engine_vllm")


def clear_method_caches(methods: Iterable[str]) -> None:
    """Empties the `functools.lru_cache` around each of `methods` (`module:Class.method`), where it has one.

    Such a cache keeps the object that was called, and so its weights on the GPU, for as long as the process lives.
    """
    for name in methods:
        module, _, path = name.partition(":")
        method = reduce(getattr, path.split("."), importlib.import_module(module))
        if hasattr(method, "cache_clear"):
            method.cache_clear()


def allocators_of(cumem: Any) -> list[Any]:
    """Torch's allocators behind the memory pools of vLLM's `CuMemAllocator`: for a tag, 0.26 has one pair of pool and
    allocator, 0.32 a list of such pairs."""
    by_tag = cumem.allocator_and_pools.values()
    pairs = [pair for each in by_tag for pair in (each if isinstance(each, list) else [each])]
    return [allocator for _, allocator in pairs]
