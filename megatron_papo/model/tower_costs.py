"""What the vision towers of several families cost alike: their matrices, mergers, attention within frames, inputs.

A family's module `costs` composes its counts of these. A merger is `PatchMerger` of `patch_merger.py`: one makes the
image tokens, and a tower of DeepStack has one more for each of its levels. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_papo.model.layer_costs import (
    ActivationSettings,
    Grid,
    ParameterCount,
    norm_saved_bytes,
    statistics_bytes,
    vision_layer,
)
from megatron_papo.model.shape import MergerNorms, ModelShape, VisionShape


def merger_parameters(shape: ModelShape, norms: MergerNorms = "patch") -> ParameterCount:
    """Parameters of one merger."""
    vision, merged = shape.vision, _merged_width(shape.vision)
    split = merged * (merged + 1) + vision.out_hidden_size * merged
    norm = vision_layer(shape).norm_parameters * (1 if norms == "patch" else vision.merge_unit)
    return ParameterCount("projector", split, norm + vision.out_hidden_size)


def _merged_width(vision: VisionShape) -> int:
    """Width of a block of patches, which a merger reads."""
    return vision.hidden_size * vision.merge_unit


def _num_patches(grids: Sequence[Grid]) -> int:
    """Number of patches of images of `grids`."""
    return sum(time * height * width for time, height, width in grids)


def matrix_flops(grids: Sequence[Grid], shape: ModelShape) -> int:
    """FLOPs of the tower's matrices in one forward pass: patch embedding and layers on every patch, every merger on
    every block of patches."""
    vision, merged, num_patches = shape.vision, _merged_width(shape.vision), _num_patches(grids)
    patch = vision.patch_dim * vision.hidden_size + vision.num_layers * vision_layer(shape).products
    block = (1 + len(vision.deepstack_layers)) * (merged**2 + merged * vision.out_hidden_size)
    return 2 * (num_patches * patch + num_patches // vision.merge_unit * block)


def frame_pairs(grids: Sequence[Grid]) -> int:
    """Number of pairs of patches of images that share a frame."""
    return sum(time * (height * width) ** 2 for time, height, width in grids)


def input_saved_bytes(num_patches: int, shape: ModelShape, settings: ActivationSettings) -> int:
    """Bytes kept of what the tower reads: pixels, cosines and sines of the rotary angles."""
    vision = shape.vision
    pixels = settings.value_bytes * vision.patch_dim // settings.sequence
    return num_patches * (pixels + 4 * vision.head_dim)


def merger_saved_bytes(
    num_patches: int, shape: ModelShape, settings: ActivationSettings, norms: MergerNorms = "patch"
) -> int:
    """Bytes that one merger keeps: what its norm keeps, the first linear's output and what the second linear reads.

    One that norms blocks reads what a layer left to the next, which keeps it already.
    """
    vision, layer, value_bytes = shape.vision, vision_layer(shape), settings.value_bytes
    blocks, merged = num_patches // vision.merge_unit, _merged_width(shape.vision)
    if norms == "patch":
        norm = num_patches * norm_saved_bytes(layer, settings, outputs=1)
    else:
        norm = blocks * (value_bytes * merged // settings.sequence + statistics_bytes(layer))
    return norm + blocks * 2 * value_bytes * (merged // settings.tensor)
