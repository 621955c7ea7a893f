"""The costs of Qwen2.5-VL's own parts: the vision tower with its windows, and the projector.

The protocol is `FamilyCosts` of `model/layer_costs.py`, which counts the layers themselves. The projector is the merger
of the tower, whose cost is counted in `model/tower_costs.py`. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from megatron_papo.model.layer_costs import ActivationSettings, Grid, ParameterCount, vision_layer
from megatron_papo.model.qwen2_5_vl.shape import WindowedVisionShape
from megatron_papo.model.shape import ModelShape
from megatron_papo.model.tower_costs import (
    frame_pairs,
    input_saved_bytes,
    matrix_flops,
    merger_parameters,
    merger_saved_bytes,
)


def vision_parameters(shape: ModelShape, width: Callable[[int], int]) -> Iterator[ParameterCount]:
    """Patch embedding and layers of the tower, and the projector; `width` pads the FFN of the layers."""
    vision = shape.vision
    yield ParameterCount("vision", 0, vision.hidden_size * vision.patch_dim)
    yield vision_layer(shape).parameters("vision", vision.num_layers, width)
    yield merger_parameters(shape)


def vision_flops(grids: Sequence[Grid], shape: ModelShape) -> int:
    """FLOPs of one forward pass of the tower and the projector over images of `grids`."""
    return matrix_flops(grids, shape) + vision_attention_flops(grids, _tower(shape))


def vision_attention_flops(grids: Sequence[Grid], vision: WindowedVisionShape) -> int:
    """FLOPs of the tower's attention, within windows in most layers and over whole frames in a few."""
    frame_layers = len(set(vision.full_attention_layers) & set(range(vision.num_layers)))
    window_pairs = sum(_window_pairs(grid, vision) for grid in grids)
    num_pairs = frame_layers * frame_pairs(grids) + (vision.num_layers - frame_layers) * window_pairs
    return 4 * num_pairs * vision.hidden_size


def _tower(shape: ModelShape) -> WindowedVisionShape:
    assert isinstance(shape.vision, WindowedVisionShape)
    return shape.vision


def _window_pairs(grid: Grid, vision: WindowedVisionShape) -> int:
    """Number of pairs of patches of an image that share a window. Windows form a lattice, so the sum is a product."""
    time, height, width = grid
    edge = vision.window_size // vision.patch_size

    def squares(length: int) -> int:
        whole, rest = divmod(length, edge)
        return whole * edge**2 + rest**2

    return time * squares(height) * squares(width)


def vision_ends_bytes(num_patches: int, shape: ModelShape, settings: ActivationSettings) -> int:
    """Bytes kept outside of the tower's layers: pixels, rotary angles, and what the projector keeps."""
    return input_saved_bytes(num_patches, shape, settings) + merger_saved_bytes(num_patches, shape, settings)
