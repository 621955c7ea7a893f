"""The geometry of a micro-batch's images: places of patches for rotary and for learned positions, and whole frames.

Patches keep the processor's order, block by block. This module does not touch pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_papo.model.attention.packed_layout import Segments, build_segments
from megatron_papo.model.attention.rotary import vision_rotation
from megatron_papo.model.patch_grid import patch_places
from megatron_papo.model.qwen3_vl.shape import InterpolatedVisionShape
from megatron_papo.types import Segment, to_device


@dataclass(frozen=True)
class FramePlan:
    """What the tower needs to know about the images of a micro-batch, whose P patches make M tokens."""

    corners_P4: Tensor
    """The four learned position embeddings around each patch, padding included."""
    shares_P4: Tensor
    """fp32: the share of each of the four; zero for padding."""
    num_padding: int
    """Number of zero patches added at the end; attention leaves them out."""
    segments: Segments
    """Which patches attend to each other: those of a frame."""


def plan_patches(
    grid_thw_I3: Tensor, shape: InterpolatedVisionShape, *, multiple: int, device: torch.device
) -> FramePlan:
    """The plan of images with these grids; the patches are padded to a multiple of `multiple`."""
    merge, grids = shape.spatial_merge_size, grid_thw_I3.tolist()
    places = np.concatenate([patch_places(time, height, width, merge) for time, height, width in grids])
    around = [interpolate(time, height, width, merge, shape.position_edge) for time, height, width in grids]
    corners, shares = (np.concatenate(parts) for parts in zip(*around))
    padding = -len(places) % multiple
    frames = [Segment(height * width) for time, height, width in grids for _ in range(time)]
    rotation = vision_rotation(
        to_device(torch.from_numpy(places), device), head_dim=shape.head_dim, theta=shape.rope_theta
    )
    at_the_end = ((0, padding), (0, 0))
    return FramePlan(
        corners_P4=to_device(torch.from_numpy(np.pad(corners, at_the_end)), device),
        shares_P4=to_device(torch.from_numpy(np.pad(shares, at_the_end)), device),
        num_padding=padding,
        segments=build_segments(frames, causal=False, device=device, rotation=rotation, num_padding=padding),
    )


def interpolate(frames: int, height: int, width: int, merge: int, edge: int) -> tuple[np.ndarray, np.ndarray]:
    """For every patch of an image of `frames` x `height` x `width` patches, in the processor's order: the four places
    [P, 4] of the learned grid of `edge` x `edge` around it, row by row, and the share [P, 4] of each in fp32.

    Bilinear; the corners of the image lie on the corners of the learned grid. A single row or column lies on the first.
    """
    places = patch_places(frames, height, width, merge)
    (top, bottom, down), (left, right, across) = (
        _neighbours(places[:, axis], size, edge) for axis, size in enumerate((height, width))
    )
    corners = np.stack([top * edge + left, top * edge + right, bottom * edge + left, bottom * edge + right], axis=1)
    shares = np.stack([(1 - down) * (1 - across), (1 - down) * across, down * (1 - across), down * across], axis=1)
    return corners, shares


def _neighbours(places: np.ndarray, size: int, edge: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The learned place before each of `places` on an axis of `size` patches, the one after it, and the share of the
    latter. fp32, as transformers computes them."""
    at = places.astype(np.float32) * np.float32(edge - 1) / np.float32(max(size - 1, 1))
    before = np.floor(at).astype(np.int64)
    return before, np.minimum(before + 1, edge - 1), at - before.astype(np.float32)
