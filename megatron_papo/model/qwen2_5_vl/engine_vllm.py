"""What is particular in vLLM's implementation of Qwen2.5-VL. Names of vLLM's are text here: only its engine imports it.

What the `engine_vllm` of a family offers: `CACHED_METHODS`, `observed_vision`, `observed_language` and `rotary_of`. A
family without this module cannot be served by vLLM.

Sleep of level 2 (generation/vllm/sleep.py) loses what is made while a model is loaded and is neither a parameter nor a
named buffer. Qwen2.5-VL keeps nothing of that kind that it does not compute anew: window indices and angles by size of
picture are made by the first picture of that size, in memory that does not sleep.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from megatron_papo.model.observed import (
    FEATURES,
    LANGUAGE_LAYER,
    PIXELS,
    POSITION_IDS,
    TOKEN_IDS,
    Observation,
    Observed,
)

CACHED_METHODS = ("vllm.model_executor.models.qwen2_5_vl:Qwen2_5_VisionTransformer.get_rope_by_thw",)
"""Methods around which a release of vLLM may have a `functools.lru_cache`, which keeps the object that was called, and
so its weights on the GPU, for as long as the process lives. vLLM 0.26 has it here: the angles of every size of picture;
0.32 keeps them in the vision tower itself."""


def observed_vision(model: Any) -> Observed:
    """What is seen of the vision tower. Its layers are not: vLLM calls them past any hook."""
    return {
        PIXELS: Observation(model.visual, lambda args, _, __: args[0]),
        FEATURES: Observation(model.visual, lambda _, __, output: output),
    }


def observed_language(model: Any) -> Observed:
    """What is seen of the language model where it runs eagerly; CUDA graphs call no hook.

    A layer's output is the sum of two, since vLLM adds the residual in the next layer.
    """
    language = model.language_model.model
    parts = {
        TOKEN_IDS: Observation(language.embed_tokens, lambda args, _, __: args[0].long()),
        POSITION_IDS: Observation(language.layers[0], lambda args, _, __: args[0].T),
    }
    return parts | {
        f"{LANGUAGE_LAYER} {number}": Observation(layer, lambda _, __, output: output[0] + output[1])
        for number, layer in enumerate(language.layers)
    }


def rotary_of(model: Any) -> nn.Module:
    """vLLM's rotary embedding of the language model: called with position ids [axes, T], queries and keys."""
    return model.language_model.model.layers[0].self_attn.rotary_emb
