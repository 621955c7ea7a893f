"""From the patches that the image processor makes back to a picture, to be looked at."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megatron_papo.data.processor import Processor


def pictures_of_patches(pixel_values_PD: Tensor, grid_thw_I3: Tensor, processor: Processor) -> Iterator[Image.Image]:
    """The pictures as the model sees them, RGB, resized as they are for it: its input with normalisation undone."""
    start = 0
    for grid in grid_thw_I3.tolist():
        end = start + grid[0] * grid[1] * grid[2]
        yield _picture(pixel_values_PD[start:end], grid[1], grid[2], processor)
        start = end


def _picture(patches_PD: Tensor, height: int, width: int, processor: Processor) -> Image.Image:
    """Rows of a merged patch follow one another; the values of a patch run over channel, frame, row and column."""
    merge, patch = processor.merge_size, processor.patch_size
    settings = processor.image_processor
    shape = (height // merge, width // merge, merge, merge, 3, settings.temporal_patch_size, patch, patch)
    frame = patches_PD.reshape(shape)[:, :, :, :, :, 0]
    pixels_HW3 = frame.permute(0, 2, 5, 1, 3, 6, 4).reshape(height * patch, width * patch, 3)
    values = pixels_HW3 * torch.tensor(settings.image_std) + torch.tensor(settings.image_mean)
    return Image.fromarray((values * 255).round().clamp(0, 255).numpy().astype(np.uint8))
