"""What vLLM's implementations of the families have in common: where hooks see their parts.

Nothing of vLLM is imported. A module that vLLM could compile is called past any hook, such as the layers of a vision
tower; what they are made of is not. vLLM adds a layer's residual in the next layer, in place, so that hidden states are
seen before that runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from megatron_papo.model.observed import (
    LANGUAGE_LAYER,
    POSITION_IDS,
    TOKEN_IDS,
    VISION_LAYER,
    Observation,
    Observed,
)


def vision_layers(blocks: Sequence[Any], norm_of_merger: nn.Module) -> dict[str, Observation]:
    """The layers of a vision tower, each seen where the first norm of what follows it gets its output [P, 1, width]."""
    followers = [*(block.norm1 for block in blocks[1:]), norm_of_merger]
    return {f"{VISION_LAYER} {number}": entering(norm) for number, norm in enumerate(followers)}


def entering(module: nn.Module) -> Observation:
    """Hidden states [T, 1, width] of a vision tower where `module` gets them."""
    return Observation(module, lambda args, _, __: args[0].flatten(0, -2), before=True)


def observed_language(model: Any) -> Observed:
    """The parts of the language model that can be observed, what is added between two layers included."""
    language = model.language_model.model
    parts = {
        TOKEN_IDS: Observation(language.embed_tokens, lambda args, _, __: args[0].long()),
        POSITION_IDS: Observation(language.layers[0], lambda args, _, __: args[0].T),
    }
    followers = [*language.layers[1:], language.norm]  # which get hidden states and residual last
    return parts | {
        f"{LANGUAGE_LAYER} {number}": Observation(each, lambda args, _, __: args[-2] + args[-1], before=True)
        for number, each in enumerate(followers)
    }


def rotary_of(model: Any) -> nn.Module:
    """The rotary embedding of the language model."""
    return model.language_model.model.layers[0].self_attn.rotary_emb
