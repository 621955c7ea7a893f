"""What this engine has to know of vLLM's implementation of a model family."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any, Protocol, cast

from torch import nn

from megatron_papo.model.family import Family
from megatron_papo.model.observed import Observed


class VllmModule(Protocol):
    """A family's `engine_vllm.py`; a family without it cannot be served by vLLM. It names vLLM's modules in text and
    does not import them."""

    CACHED_METHODS: Sequence[str]
    """Methods, as `module:Class.method`, around which a release of vLLM may have a `functools.lru_cache`. It would keep
    the object that was called, and so its weights on the GPU, for as long as the process lives."""

    ZEROS: Sequence[str]
    """Attributes of vLLM's model with lists of tensors that are made of zeros while it is loaded, are neither
    parameters nor buffers, and have to be zero whenever a batch begins: sleep of level 2 forgets them
    (`sleep.refill_zeros`). What else sleep would lose of a model, beside parameters and buffers, has no way back."""

    def observed_vision(self, model: Any) -> Observed:
        """The parts of the vision tower of vLLM's model."""

    def observed_language(self, model: Any) -> Observed:
        """Token ids, position ids and layers of the language model, where it runs eagerly; CUDA graphs call no hook."""

    def rotary_of(self, model: Any) -> nn.Module:
        """The language model's rotary embedding, which is called with position ids [axes, T], queries and keys."""


def vllm_module(family: Family) -> VllmModule:
    """The family's module `engine_vllm`. Raises ValueError for a family without one."""
    if importlib.util.find_spec(f"{family.package}.engine_vllm") is None:
        raise ValueError(f"generation.engine=vllm: nothing is known of vLLM's implementation of {family.model_type}")
    return cast("VllmModule", family.module("engine_vllm"))
