"""transformers' implementation of Qwen3-VL (`TransformersModule` in generation/reference_model.py)."""

from __future__ import annotations

from typing import Any

import transformers.models.qwen2_vl.image_processing_qwen2_vl
import transformers.models.qwen3_vl.video_processing_qwen3_vl  # noqa: F401 (parts of the processor, loaded before processes are forked)
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from megatron_papo.model.observed import LEVEL, POSITION_EMBEDDINGS, Observation, Observed
from megatron_papo.model.transformers_calls import forward, max_positions, position_ids, usual_parts

CONFIG_CLASS = Qwen3VLConfig
MODEL_CLASS = Qwen3VLForConditionalGeneration

__all__ = ["CONFIG_CLASS", "MODEL_CLASS", "forward", "max_positions", "observed", "position_ids"]


def observed(model: Any) -> Observed:
    """The usual parts, the patches with their positions, and the levels of DeepStack."""
    tower = model.model.visual

    def level(number: int) -> Observation:
        return Observation(tower, lambda _, __, output: output.deepstack_features[number])

    positioned = Observation(tower.blocks[0], lambda args, _, __: args[0], before=True)
    levels = {f"{LEVEL} {number}": level(number) for number in range(len(tower.deepstack_merger_list))}
    return usual_parts(model) | {POSITION_EMBEDDINGS: positioned} | levels
