"""The costs of Qwen2.5-VL's own parts: the vision tower with its windows, and the projector.

The protocol is `FamilyCosts` of `model/layer_costs.py`, which counts the layers themselves. The projector is the merger
of the tower: a norm over patches and an MLP over blocks of them. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from megatron_papo.model.layer_costs import (
    ActivationSettings,
    Grid,
    ParameterCount,
    norm_saved_bytes,
    vision_layer,
)
from megatron_papo.model.qwen2_5_vl.shape import WindowedVisionShape
from megatron_papo.model.shape import ModelShape


def vision_parameters(shape: ModelShape, width: Callable[[int], int]) -> Iterator[ParameterCount]:
    """Patch embedding and layers of the tower, and the projector; `width` pads the FFN of the layers."""
    vision = shape.vision
    hidden, merged = vision.hidden_size, vision.hidden_size * vision.merge_unit
    yield ParameterCount("vision", 0, hidden * vision.patch_dim)
    yield vision_layer(shape).parameters("vision", vision.num_layers, width)
    split = merged * (merged + 1) + vision.out_hidden_size * merged
    yield ParameterCount("projector", split, hidden + vision.out_hidden_size)


def vision_flops(grids: Sequence[Grid], shape: ModelShape) -> int:
    """FLOPs of one forward pass of the tower and the projector over images of `grids`."""
    return vision_linear_flops(grids, shape) + vision_attention_flops(grids, _tower(shape))


def vision_linear_flops(grids: Sequence[Grid], shape: ModelShape) -> int:
    """FLOPs of the matrices: patch embedding and layers on every patch, the projector on every block of patches."""
    vision = shape.vision
    num_patches = sum(time * height * width for time, height, width in grids)
    hidden, merged = vision.hidden_size, vision.hidden_size * vision.merge_unit
    patch = vision.patch_dim * hidden + vision.num_layers * vision_layer(shape).products
    block = merged**2 + merged * vision.out_hidden_size
    return 2 * (num_patches * patch + num_patches // vision.merge_unit * block)


def vision_attention_flops(grids: Sequence[Grid], vision: WindowedVisionShape) -> int:
    """FLOPs of the tower's attention, within windows in most layers and over whole frames in a few."""
    frame_layers = len(set(vision.full_attention_layers) & set(range(vision.num_layers)))
    frame_pairs = sum(time * (height * width) ** 2 for time, height, width in grids)
    window_pairs = sum(_window_pairs(grid, vision) for grid in grids)
    num_pairs = frame_layers * frame_pairs + (vision.num_layers - frame_layers) * window_pairs
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
    """Bytes kept outside of the tower's layers: pixels, cosines and sines of the rotary angles, and in the projector
    what its norm keeps, the first linear's output and what the second linear reads."""
    vision, value_bytes = shape.vision, settings.value_bytes
    merger_norm = norm_saved_bytes(vision_layer(shape), settings, outputs=1)
    pixels, angles = value_bytes * vision.patch_dim // settings.sequence, 4 * vision.head_dim
    blocks = num_patches // vision.merge_unit
    merged = vision.hidden_size * vision.merge_unit // settings.tensor
    return num_patches * (merger_norm + pixels + angles) + blocks * 2 * value_bytes * merged
