"""Turns processed pixels back into pictures, for an engine that takes pictures only.

The processor resizes a picture, then normalises it and cuts it into patches. This module undoes the last two without
loss, which gives the resized picture; the processor makes the same pixels of it again, because its size needs no second
resize. So an engine sees exactly the pixels that the trainer sees, whether they are the original or a masked view, and
compressed images are decoded once.
"""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor

_TOLERANCE = 0.05
"""How far a value may be from one of the 256 levels, in levels; fp32 rounding stays far below."""


def pictures(pixel_values_PD: Tensor, grid_thw_I3: Tensor, image_processor: Any) -> list[Image.Image]:
    """One RGB picture for each image, a row of `grid_thw_I3` (frames, height, width in patches).

    Raises ValueError for video grids and for pixel values that no picture of 256 levels gives.
    """
    sizes = grid_thw_I3.prod(dim=1).tolist()
    return [
        _picture(patches_PD, grid, image_processor)
        for patches_PD, grid in zip(pixel_values_PD.split(sizes), grid_thw_I3.tolist())
    ]


def _picture(patches_PD: Tensor, grid: list[int], image_processor: Any) -> Image.Image:
    time, height, width = grid
    if time != 1:
        raise ValueError(f"grid {grid}: video is not supported")
    merge, patch = image_processor.merge_size, image_processor.patch_size
    frames = image_processor.temporal_patch_size
    # patches lie merged block by merged block: (rows, columns) of blocks, then (row, column) within the block
    blocks = patches_PD.cpu().view(height // merge, width // merge, merge, merge, 3, frames, patch, patch)[
        :, :, :, :, :, 0
    ]
    normalised_CHW = blocks.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, height * patch, width * patch)
    mean_C11 = torch.tensor(image_processor.image_mean).view(3, 1, 1)
    std_C11 = torch.tensor(image_processor.image_std).view(3, 1, 1)
    levels_CHW = (normalised_CHW * std_C11 + mean_C11) / image_processor.rescale_factor
    whole_CHW = levels_CHW.round().clamp(0, 255)
    if (levels_CHW - whole_CHW).abs().max() > _TOLERANCE:
        raise ValueError("pixel values are not those of a picture with 256 levels")
    return Image.fromarray(whole_CHW.to(torch.uint8).permute(1, 2, 0).contiguous().numpy(), mode="RGB")
