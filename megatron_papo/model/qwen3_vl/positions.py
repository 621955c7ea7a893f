"""M-RoPE positions of a prompt, as Qwen3-VL counts them: as Qwen2.5-VL does, where all images are still."""

from __future__ import annotations

from megatron_papo.model.mrope_positions import image_grid_positions as prompt_positions

__all__ = ["prompt_positions"]
