"""The masked view of a prompt: its pictures spoiled, everything else alike.

Pure and seeded from (run seed, step, prompt id, image index), so that a resumed run masks alike, every picture of a
prompt is masked independently, and the next visit draws afresh. The paper's mask is `cells` on the picture as loaded:
a grid of square cells from the upper left corner, each black with probability `ratio`, the partial ones at the right
and lower edge too. The spoiled picture keeps its size and goes through the same processor, so the grid of patches,
and with it the position ids, stay those of the original.

Beyond the paper: `align: patches` blackens merged patches of the already processed pixels, without a second run of
the processor; and other kinds of spoiling. `ratio` and `cell` mean, for blur: radius `cell` pixels; noise: weight
`ratio` of uniform noise; crop: a window of area 1 - ratio enlarged to the full size; swap: neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from megatron_papo.config import MaskConfig
from megatron_papo.data.images import decode_image
from megatron_papo.data.order import random_state
from megatron_papo.data.processor import Processor
from megatron_papo.types import Prompt

_SWAP_TRIES = 100


@dataclass(frozen=True)
class Masks:
    """Which masked view a prompt gets beside its own."""

    settings: MaskConfig
    seed: int
    """The run's."""
    step: int = 0


class SwapPool(Protocol):
    """Where pictures of other prompts come from: a PromptDataset. Not the rank's own prompts of the step, which
    would make the masked view depend on the number of ranks."""

    def __len__(self) -> int: ...

    def images(self, row: int) -> tuple[bytes, ...]: ...


def mask_images(
    prompt: Prompt,
    mask: MaskConfig,
    processor: Processor,
    *,
    seed: int,
    step: int,
    images: Sequence[Image.Image] | None = None,
    swap_pool: SwapPool | None = None,
) -> Prompt:
    """The prompt with `masked_pixel_values_PD` filled; a prompt without pictures comes back as it is.

    `images`: the prompt's pictures, from whoever has decoded them already; they stay as they are.
    """
    if prompt.inputs.pixel_values_PD is None:
        return prompt
    if mask.align == "patches":
        return replace(prompt, masked_pixel_values_PD=_mask_patches(prompt, mask, processor, seed=seed, step=step))
    masked = masked_raw_images(prompt, mask, seed=seed, step=step, images=images, swap_pool=swap_pool)
    pixel_values_PD, grid_thw_I3 = processor.pixel_values(masked)
    assert prompt.inputs.grid_thw_I3 is not None
    assert torch.equal(grid_thw_I3, prompt.inputs.grid_thw_I3), "the masked view has another grid"
    return replace(prompt, masked_pixel_values_PD=pixel_values_PD)


def masked_raw_images(
    prompt: Prompt,
    mask: MaskConfig,
    *,
    seed: int,
    step: int,
    images: Sequence[Image.Image] | None = None,
    swap_pool: SwapPool | None = None,
) -> list[Image.Image]:
    """The spoiled pictures themselves, RGB in their own size.

    Only for `align: raw`. `images` as in `mask_images`. Raises ValueError for `swap` without a pool or with one that
    has no other picture.
    """
    assert mask.align == "raw"
    masked = []
    for index, image in enumerate(map(decode_image, prompt.images) if images is None else images):
        random = _generator(prompt, seed, step, index)
        if mask.kind == "swap":
            masked.append(_other_image(prompt, swap_pool, random).resize(image.size, Image.Resampling.BICUBIC))
        else:
            masked.append(_SPOIL[mask.kind](image, mask, random))
    return masked


def cell_mask(height: int, width: int, cell: int, ratio: float, random: np.random.RandomState) -> np.ndarray:
    """[height, width] bool, True where black: whole cells, cut off at the right and lower edge."""
    rows, columns = -(-height // cell), -(-width // cell)
    cells = random.random_sample((rows, columns)) < ratio
    return cells.repeat(cell, axis=0).repeat(cell, axis=1)[:height, :width]


def _generator(prompt: Prompt, seed: int, step: int, index: int) -> np.random.RandomState:
    return random_state("mask", seed, step, prompt.id, index)


def _black_cells(image: Image.Image, mask: MaskConfig, random: np.random.RandomState) -> Image.Image:
    pixels = np.array(image)
    pixels[cell_mask(image.height, image.width, mask.cell, mask.ratio, random)] = 0
    return Image.fromarray(pixels)


def _blur(image: Image.Image, mask: MaskConfig, random: np.random.RandomState) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(mask.cell))


def _noise(image: Image.Image, mask: MaskConfig, random: np.random.RandomState) -> Image.Image:
    pixels = np.array(image)
    noise = random.randint(0, 256, size=pixels.shape)
    return Image.fromarray(np.rint((1 - mask.ratio) * pixels + mask.ratio * noise).astype(np.uint8))


def _crop(image: Image.Image, mask: MaskConfig, random: np.random.RandomState) -> Image.Image:
    edge = (1 - mask.ratio) ** 0.5
    width, height = max(1, round(image.width * edge)), max(1, round(image.height * edge))
    left, top = random.randint(image.width - width + 1), random.randint(image.height - height + 1)
    return image.crop((left, top, left + width, top + height)).resize(image.size, Image.Resampling.BICUBIC)


_SPOIL = {"cells": _black_cells, "blur": _blur, "noise": _noise, "crop": _crop}


def _other_image(prompt: Prompt, pool: SwapPool | None, random: np.random.RandomState) -> Image.Image:
    if pool is None:
        raise ValueError("perception.mask.kind: swap needs the dataset to take pictures from")
    for _ in range(_SWAP_TRIES):
        row = int(random.randint(len(pool)))
        if row == prompt.row:
            continue
        try:
            candidates = pool.images(row)
            return decode_image(candidates[random.randint(len(candidates))])
        except ValueError:  # a bad row, or one without pictures (randint(0) raises it too)
            continue
    raise ValueError(f"perception.mask.kind: swap found no other picture in {_SWAP_TRIES} rows")


def _mask_patches(prompt: Prompt, mask: MaskConfig, processor: Processor, *, seed: int, step: int) -> Tensor:
    """Merged patches set to what black becomes after normalisation; rows of a merged patch follow one another."""
    assert prompt.inputs.pixel_values_PD is not None and prompt.inputs.grid_thw_I3 is not None
    pixel_values_PD = prompt.inputs.pixel_values_PD.clone()
    patches_per_cell = processor.merge_size**2
    start = 0
    for index, (time, height, width) in enumerate(prompt.inputs.grid_thw_I3.tolist()):
        assert time == 1, "a picture has one frame"
        num_cells = height * width // patches_per_cell
        cells = torch.from_numpy(_generator(prompt, seed, step, index).random_sample(num_cells) < mask.ratio)
        image_mask_P = cells.repeat_interleave(patches_per_cell)
        pixel_values_PD[start : start + image_mask_P.numel()][image_mask_P] = _black_patch(processor)
        start += image_mask_P.numel()
    return pixel_values_PD


def _black_patch(processor: Processor) -> Tensor:
    """[D] float32: a black patch after normalisation; D runs over channel, frame, row, column."""
    settings = processor.image_processor
    values_per_channel = settings.temporal_patch_size * settings.patch_size**2
    black = [-mean / std for mean, std in zip(settings.image_mean, settings.image_std)]
    return torch.tensor(black, dtype=torch.float32).repeat_interleave(values_per_channel)
