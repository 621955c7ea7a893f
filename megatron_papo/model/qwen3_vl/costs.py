"""The costs of Qwen3-VL's own parts: the vision tower with its learned positions, and the projector of all its levels.

The protocol is `FamilyCosts` of `model/layer_costs.py`, which counts the layers themselves; what the mergers cost is
counted in `model/tower_costs.py`. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from megatron_papo.model.layer_costs import ActivationSettings, Grid, ParameterCount, vision_layer
from megatron_papo.model.shape import ModelShape
from megatron_papo.model.tower_costs import (
    frame_pairs,
    input_saved_bytes,
    matrix_flops,
    merger_parameters,
    merger_saved_bytes,
)


def vision_parameters(shape: ModelShape, width: Callable[[int], int]) -> Iterator[ParameterCount]:
    """Patch embedding with its bias, learned positions and layers of the tower, and the mergers of all levels; `width`
    pads the FFN of the layers."""
    vision = shape.vision
    yield ParameterCount("vision", 0, vision.hidden_size * (vision.patch_dim + 1 + vision.position_edge**2))
    yield vision_layer(shape).parameters("vision", vision.num_layers, width)
    yield merger_parameters(shape)
    for _ in vision.deepstack_layers:
        yield merger_parameters(shape, "block")


def vision_flops(grids: Sequence[Grid], shape: ModelShape) -> int:
    """FLOPs of one forward pass of the tower and the projector over images of `grids`."""
    vision = shape.vision
    return matrix_flops(grids, shape) + 4 * vision.num_layers * frame_pairs(grids) * vision.hidden_size


def vision_ends_bytes(num_patches: int, shape: ModelShape, settings: ActivationSettings) -> int:
    """Bytes kept outside of the tower's layers: pixels, rotary angles, the four learned positions around each patch
    with their shares, and what every merger keeps."""
    positions = num_patches * 4 * (8 + 4)  # indices in int64, shares in fp32; whole on every tensor rank
    levels = len(shape.vision.deepstack_layers) * merger_saved_bytes(num_patches, shape, settings, "block")
    merger = merger_saved_bytes(num_patches, shape, settings)
    return input_saved_bytes(num_patches, shape, settings) + positions + merger + levels
