"""transformers' implementation of Qwen3-VL (`TransformersModule` in generation/reference_model.py)."""

from __future__ import annotations

import transformers.models.qwen2_vl.image_processing_qwen2_vl
import transformers.models.qwen3_vl.video_processing_qwen3_vl  # noqa: F401 (parts of the processor, loaded before processes are forked)
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from megatron_papo.model.transformers_calls import forward, max_positions, position_ids
from megatron_papo.model.transformers_calls import usual_parts as observed

CONFIG_CLASS = Qwen3VLConfig
MODEL_CLASS = Qwen3VLForConditionalGeneration

__all__ = ["CONFIG_CLASS", "MODEL_CLASS", "forward", "max_positions", "observed", "position_ids"]
