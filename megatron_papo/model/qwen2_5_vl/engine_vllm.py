"""vLLM's implementation of Qwen2.5-VL (`VllmModule` in generation/vllm/family_module.py).

Sleep of level 2 (generation/vllm/sleep.py) loses what is made while a model is loaded and is neither a parameter nor a
named buffer. Qwen2.5-VL has nothing of that kind: window indices and angles are computed for the first picture of each
size, after loading, in memory that sleep leaves alone.
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
"""Methods with a cache: vLLM 0.26 stores in it the angles of every size of picture, 0.32 in the vision tower itself."""


def observed_vision(model: Any) -> Observed:
    """The parts of the vision tower that can be observed."""
    return {
        PIXELS: Observation(model.visual, lambda args, _, __: args[0]),
        FEATURES: Observation(model.visual, lambda _, __, output: output),
    }


def observed_language(model: Any) -> Observed:
    """The parts of the language model that can be observed. A layer's output is the sum of two values, since vLLM adds
    the residual in the next layer."""
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
    """The rotary embedding of the language model."""
    return model.language_model.model.layers[0].self_attn.rotary_emb
