"""The geometry of a micro-batch's images: the order of patches in the vision tower, their positions, their windows.

The processor lays patches out block by block: the merge_unit patches that become one token lie together. The tower
works in window order: the merged blocks of a window lie together, and windows follow one another in reading order. Both
orders depend only on the grids of the images. This module does not touch pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from megatron_papo.model.attention.packed_layout import WindowedSegments, build_segments
from megatron_papo.model.attention.rotary import vision_rotation
from megatron_papo.model.patch_grid import block_grid, patch_places
from megatron_papo.model.qwen2_5_vl.shape import WindowedVisionShape
from megatron_papo.types import Segment, to_device


@dataclass(frozen=True)
class PatchPlan:
    """What the tower needs to know about the images of a micro-batch, whose P patches make M tokens."""

    patch_order_P: Tensor
    """The number, in the processor's order, of the patch at each place of window order."""
    token_order_M: Tensor
    """The place in window order of each token of the language model; it undoes the window order after merging."""
    num_padding: int
    """Number of zero patches added at the end; attention leaves them out."""
    segments: WindowedSegments
    """Which patches attend to each other, in window order."""


def plan_patches(grid_thw_I3: Tensor, shape: WindowedVisionShape, *, multiple: int, device: torch.device) -> PatchPlan:
    """The plan of images with these grids; the patches are padded to a multiple of `multiple`."""
    merge, window = shape.spatial_merge_size, shape.window_size // shape.patch_size // shape.spatial_merge_size
    images = [plan_image(t, h, w, merge, window) for t, h, w in grid_thw_I3.tolist()]
    blocks = [len(image.block_order) for image in images]
    firsts = np.cumsum([0, *blocks[:-1]])
    block_order = np.concatenate([image.block_order + first for image, first in zip(images, firsts)])
    patch_order = (block_order[:, None] * merge**2 + np.arange(merge**2)).reshape(-1)
    positions = np.concatenate([image.positions for image in images])[patch_order]
    padding = -len(patch_order) % multiple
    windows = [Segment(length) for image in images for length in image.windows]
    frames = [Segment(length) for image in images for length in image.frames]
    places = to_device(torch.from_numpy(positions), device)
    rotation = vision_rotation(places, head_dim=shape.head_dim, theta=shape.rope_theta)
    return PatchPlan(
        patch_order_P=to_device(torch.from_numpy(patch_order), device),
        token_order_M=to_device(torch.from_numpy(np.argsort(block_order)), device),
        num_padding=padding,
        segments=WindowedSegments(
            windows=build_segments(windows, causal=False, device=device, rotation=rotation, num_padding=padding),
            frames=build_segments(frames, causal=False, device=device, rotation=rotation, num_padding=padding),
            frame_layers=frozenset(shape.full_attention_layers),
        ),
    )


@dataclass(frozen=True)
class _ImagePlan:
    """The order and the segments of the patches of one image."""

    block_order: np.ndarray
    """The numbers of the merged blocks, in window order."""
    positions: np.ndarray
    """[P, 2] row and column of each patch, in the processor's order."""
    windows: tuple[int, ...]
    """Number of patches of each window, in window order."""
    frames: tuple[int, ...]
    """Number of patches of each frame."""


@lru_cache(maxsize=4096)
def plan_image(frames: int, height: int, width: int, merge: int, window: int) -> _ImagePlan:
    """The plan of an image of `frames` x `height` x `width` patches. `merge`: patches along the edge of a merged block;
    `window`: merged blocks along the edge of a window."""
    time, row, column = block_grid(frames, height, width, merge)
    keys = (time, row // window, column // window)
    block_order = np.lexsort((column, row, *reversed(keys)))
    of_window = np.stack(keys)[:, block_order]
    first = np.flatnonzero((np.diff(of_window, axis=1) != 0).any(axis=0)) + 1
    windows = np.diff(np.concatenate([[0], first, [len(block_order)]])) * merge**2
    positions = patch_places(frames, height, width, merge)
    return _ImagePlan(block_order, positions, tuple(windows.tolist()), (height * width,) * frames)
