"""The masked view of a prompt: its pictures spoiled, everything else alike.

Pure and seeded from (run seed, visit, prompt id, image index), so that a resumed run masks alike, every picture of a
prompt is masked independently, and the next visit draws afresh, though it be in the same step. The paper's mask is
`cells` on the picture as loaded: a grid of square cells from the upper left corner, each black with probability
`ratio`, the partial ones at the right and lower edge too. The spoiled picture keeps its size and goes through the same
processor, so the grid of patches, and with it the position ids, stay those of the original.

Beyond the paper: `align: patches` blackens merged patches of the already processed pixels, without a second run of
the processor; and other kinds of spoiling. `ratio` and `cell` mean, for blur: radius `cell` pixels; noise: weight
`ratio` of uniform noise; crop: a window of area 1 - ratio enlarged to the full size; swap: neither. A function of the
user's own may take the place of all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from megatron_papo.config import MaskConfig
from megatron_papo.config.user_function import load_user_function
from megatron_papo.data.images import decode_image
from megatron_papo.data.processor import Pixels, Processor
from megatron_papo.data.random_state import random_state
from megatron_papo.text.untrusted import shortened
from megatron_papo.types import Prompt

_SWAP_TRIES = 100
_NOISE_ROWS = 64
_MOST_LETTERS = 300


@dataclass(frozen=True)
class Masks:
    """Which masked view a prompt gets beside its own."""

    settings: MaskConfig
    seed: int
    """Seed of the run, `run.seed`."""

    def __post_init__(self) -> None:
        """Raises ValueError for a function of the user's own that cannot be called."""
        if self.settings.function is not None:
            _own_function(self.settings.function)

    def for_patches_of(self, processor: Processor) -> Masks:
        """With what the settings leave to the model folder: a cell is a patch."""
        if self.settings.cell is not None:
            return self
        return replace(self, settings=self.settings.model_copy(update={"cell": processor.patch_size}))


class SwapPool(Protocol):
    """Where pictures of other prompts come from: a PromptDataset. Not the rank's own prompts of the step, which
    would make the masked view depend on the number of ranks."""

    def __len__(self) -> int: ...

    def images(self, row: int) -> tuple[bytes, ...]: ...

    def decoded(self, data: bytes) -> Image.Image: ...


def mask_images(prompt: Prompt, masks: Masks, processor: Processor, swap_pool: SwapPool | None = None) -> Prompt:
    """The prompt with `masked_pixel_values_PD` filled; a prompt without pictures comes back as it is.

    Pictures are decoded, spoiled and processed one at a time: a whole row of them may not fit the host's memory.
    """
    if prompt.inputs.pixel_values_PD is None:
        return prompt
    if masks.settings.align == "patches":
        return replace(prompt, masked_pixel_values_PD=_mask_patches(prompt, masks, processor))
    spoiled = masked_raw_images(prompt, masks.for_patches_of(processor), swap_pool)
    return with_masked(prompt, [processor.pixel_values([image]) for image in spoiled])


def with_masked(prompt: Prompt, pixels: Sequence[Pixels]) -> Prompt:
    """The prompt with its spoiled pictures, each as the processor gave it."""
    grid_thw_I3 = torch.cat([grid for _, grid in pixels])
    assert prompt.inputs.grid_thw_I3 is not None
    assert torch.equal(grid_thw_I3, prompt.inputs.grid_thw_I3), "the masked view has another grid"
    return replace(prompt, masked_pixel_values_PD=torch.cat([values for values, _ in pixels]))


def masked_raw_images(prompt: Prompt, masks: Masks, swap_pool: SwapPool | None = None) -> Iterator[Image.Image]:
    """The spoiled pictures themselves, one after the other, RGB in their own size.

    Only for `align: raw`, with a cell of a size. Raises ValueError for `swap` without a pool or with one that has no
    other picture.
    """
    for index, data in enumerate(prompt.images):
        random = mask_random(masks.seed, prompt.visit, prompt.id, index)
        yield spoil_image(decode_image(data), prompt.row, masks.settings, random, swap_pool)


def mask_random(seed: int, visit: int, prompt_id: str, index: int) -> np.random.RandomState:
    """The random numbers that spoil picture `index` of a prompt at a visit."""
    return random_state("mask", seed, visit, prompt_id, index)


def spoil_image(
    image: Image.Image, row: int, mask: MaskConfig, random: np.random.RandomState, swap_pool: SwapPool | None
) -> Image.Image:
    """A picture of row `row` as `align: raw` shows it masked, by `mask_random`; `image` stays as it is. `mask` names a
    cell."""
    assert mask.align == "raw"
    if mask.function is not None:
        return _by_own_function(image, row, mask.function, random)
    if mask.kind == "swap":
        return _other_image(row, swap_pool, random).resize(image.size, Image.Resampling.BICUBIC)
    return _SPOIL[mask.kind](image, mask, random)


@cache
def _own_function(name: str) -> Callable[..., Any]:
    return load_user_function("perception.mask.function", name, ("image", "rng"))[0]


def _by_own_function(image: Image.Image, row: int, name: str, random: np.random.RandomState) -> Image.Image:
    """What the function makes of a copy of the picture. Raises ValueError that names it and the row."""
    failed = f"perception.mask.function: {name} for row {row}"
    try:
        masked = _own_function(name)(image.copy(), random)
    except Exception as error:  # the user's own code may raise anything
        raise ValueError(f"{failed}: {type(error).__name__}: {shortened(error, _MOST_LETTERS)}") from error
    if not isinstance(masked, Image.Image):
        raise ValueError(f"{failed}: gives {type(masked).__name__}, not a picture of PIL")
    if (masked.size, masked.mode) != (image.size, image.mode):
        given, wanted = (f"{each.mode} {each.width} x {each.height}" for each in (masked, image))
        raise ValueError(f"{failed}: gives {given}, not {wanted}, as the picture is")
    return masked


def cell_mask(height: int, width: int, cell: int, ratio: float, random: np.random.RandomState) -> np.ndarray:
    """[height, width] bool, True where black: whole cells, cut off at the right and lower edge."""
    rows, columns = -(-height // cell), -(-width // cell)
    cells = random.random_sample((rows, columns)) < ratio
    return cells.repeat(cell, axis=0).repeat(cell, axis=1)[:height, :width]


def _black_cells(image: Image.Image, mask: MaskConfig, random: np.random.RandomState) -> Image.Image:
    assert mask.cell is not None
    pixels = np.array(image)
    pixels[cell_mask(image.height, image.width, mask.cell, mask.ratio, random)] = 0
    return Image.fromarray(pixels)


def _blur(image: Image.Image, mask: MaskConfig, random: np.random.RandomState) -> Image.Image:
    assert mask.cell is not None
    return image.filter(ImageFilter.GaussianBlur(mask.cell))


def _noise(image: Image.Image, mask: MaskConfig, random: np.random.RandomState) -> Image.Image:
    pixels = np.array(image)
    for start in range(0, len(pixels), _NOISE_ROWS):  # 64-bit numbers of a whole picture would take 100 bytes a pixel
        rows = pixels[start : start + _NOISE_ROWS]
        noise = random.randint(0, 256, size=rows.shape)
        rows[:] = np.rint((1 - mask.ratio) * rows + mask.ratio * noise).astype(np.uint8)
    return Image.fromarray(pixels)


def _crop(image: Image.Image, mask: MaskConfig, random: np.random.RandomState) -> Image.Image:
    edge = (1 - mask.ratio) ** 0.5
    width, height = max(1, round(image.width * edge)), max(1, round(image.height * edge))
    left, top = random.randint(image.width - width + 1), random.randint(image.height - height + 1)
    return image.crop((left, top, left + width, top + height)).resize(image.size, Image.Resampling.BICUBIC)


_SPOIL = {"cells": _black_cells, "blur": _blur, "noise": _noise, "crop": _crop}


def _other_image(own_row: int, pool: SwapPool | None, random: np.random.RandomState) -> Image.Image:
    if pool is None:
        raise ValueError("perception.mask.kind: swap needs the dataset to take pictures from")
    reason = "none of them holds one"
    for _ in range(_SWAP_TRIES):
        row = int(random.randint(len(pool)))
        if row == own_row:
            continue
        try:
            candidates = pool.images(row)
            if candidates:
                return pool.decoded(candidates[random.randint(len(candidates))])
        except (ValueError, MemoryError, RecursionError) as error:  # a bad row
            reason = f"the last: {error or type(error).__name__}"
    raise ValueError(f"perception.mask.kind: swap found no other picture in {_SWAP_TRIES} rows: {reason}")


def _mask_patches(prompt: Prompt, masks: Masks, processor: Processor) -> Tensor:
    """Merged patches set to what black becomes after normalisation; rows of a merged patch follow one another."""
    assert prompt.inputs.pixel_values_PD is not None and prompt.inputs.grid_thw_I3 is not None
    pixel_values_PD = prompt.inputs.pixel_values_PD.clone()
    patches_per_cell = processor.merge_size**2
    start = 0
    for index, (time, height, width) in enumerate(prompt.inputs.grid_thw_I3.tolist()):
        assert time == 1, "a picture has one frame"
        num_cells = height * width // patches_per_cell
        random = mask_random(masks.seed, prompt.visit, prompt.id, index)
        cells = torch.from_numpy(random.random_sample(num_cells) < masks.settings.ratio)
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
