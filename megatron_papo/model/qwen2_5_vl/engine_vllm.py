"""vLLM's implementation of Qwen2.5-VL (`VllmModule` in generation/vllm/family_module.py)."""

from __future__ import annotations

from typing import Any

from megatron_papo.model.observed import FEATURES, PIXELS, Observation, Observed
from megatron_papo.model.vllm_calls import observed_language, rotary_of, vision_layers

CACHED_METHODS = ("vllm.model_executor.models.qwen2_5_vl:Qwen2_5_VisionTransformer.get_rope_by_thw",)
"""Methods with a cache: vLLM 0.26 stores in it the angles of every size of picture, 0.32 in the vision tower itself."""
ZEROS = ()
"""No tensors of zeros. Window indices and angles are computed for the first picture of each size, after loading, in
memory that sleep leaves alone."""

__all__ = ["CACHED_METHODS", "ZEROS", "observed_language", "observed_vision", "rotary_of"]


def observed_vision(model: Any) -> Observed:
    """The parts of the vision tower that can be observed."""
    tower = model.visual
    parts = {
        PIXELS: Observation(tower, lambda args, _, __: args[0]),
        FEATURES: Observation(tower, lambda _, __, output: output),
    }
    return parts | vision_layers(tower.blocks, tower.merger.ln_q)
