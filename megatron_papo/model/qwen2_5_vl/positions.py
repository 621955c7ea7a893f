"""M-RoPE positions of a prompt, as Qwen2.5-VL counts them."""

from __future__ import annotations

from megatron_papo.model.mrope_positions import image_grid_positions as prompt_positions

__all__ = ["prompt_positions"]
