"""vLLM's implementation of Qwen3-VL (`VllmModule` in generation/vllm/family_module.py)."""

from __future__ import annotations

from typing import Any

from megatron_papo.model.observed import FEATURES, LEVEL, PIXELS, POSITION_EMBEDDINGS, Observation, Observed
from megatron_papo.model.vllm_calls import entering, observed_language, rotary_of, vision_layers

CACHED_METHODS = ()
"""No cached methods: 0.26 caches `rot_pos_ids`, a static method that keeps no object, and 0.32 stores the same indices
in the vision tower itself; both lie in host memory."""
ZEROS = ("deepstack_input_embeds",)
"""The levels of DeepStack at the places of a batch: image tokens are written and wiped out again with every batch that
has images, and all else has to be zero, since it is added to the hidden states of every batch."""

__all__ = ["CACHED_METHODS", "ZEROS", "observed_language", "observed_vision", "rotary_of"]


def observed_vision(model: Any) -> Observed:
    """The parts of the vision tower that can be observed. Its output has the image features in the first columns, and
    each level of DeepStack in as many more."""
    tower, num_levels = model.visual, len(model.visual.deepstack_merger_list)

    def columns(place: int) -> Observation:
        return Observation(tower, lambda _, __, output: output.chunk(1 + num_levels, -1)[place])

    parts = {
        PIXELS: Observation(tower, lambda args, _, __: args[0]),
        POSITION_EMBEDDINGS: entering(tower.blocks[0].norm1),
        FEATURES: columns(0),
        **{f"{LEVEL} {number}": columns(1 + number) for number in range(num_levels)},
    }
    return parts | vision_layers(tower.blocks, tower.merger.norm)
