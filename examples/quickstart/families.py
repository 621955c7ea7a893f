"""The families that the quickstart has a small model of, and what differs between these models: the one list of them.

Imports nothing heavy, so that a program can name the families before it loads torch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """What the quickstart's model of a family has of its own."""

    token_edge: int
    """Pixels along the edge of the square that one image token covers: 2 x 2 patches."""
    vision: dict[str, object]
    """`vision_config` of config.json, as `model_folder.model_config` takes it."""


FAMILIES = {
    "qwen2_5_vl": Family(
        token_edge=28,
        vision={
            "depth": 2,
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_heads": 4,
            "window_size": 112,
            "fullatt_block_indexes": [1],
        },
    ),
    # Each level of DeepStack has a merger of its own: at a width of 96 the model would have 1.6 million parameters.
    "qwen3_vl": Family(
        token_edge=32,
        vision={
            "depth": 3,
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_heads": 4,
            "num_position_embeddings": 36,  # a grid of 6 x 6, interpolated to the 4 x 4 patches of a picture
            "deepstack_visual_indexes": [0, 1, 2],
        },
    ),
}
"""By `model_type` of config.json."""
DEFAULT = "qwen2_5_vl"
