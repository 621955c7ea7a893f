"""From a picture of any mode to RGB pixels of 8 bits, as somebody sees it on white paper.

What is transparent shows white, as with vLLM's loader and with those that come with the models: a drawing on
transparency is most often black, and its hidden pixels are black too. Grey of 16 bits loses its lower byte, as Pillow
does with colours of 16 bits; its own conversion would make everything above 255 white. A picture of 32-bit whole
numbers or fractions (TIFF) does not say which of them is white: its least becomes black and its greatest white.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

_WHITE = 255


def rgb(image: Image.Image) -> Image.Image:
    """RGB in the same size. Raises ValueError for a picture of fractions that are not all finite."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return _from_16_bits(image)
    if image.mode in ("I", "F"):
        return _stretched(image)
    if image.has_transparency_data:
        return _on_white(image)
    return image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    grey = (values >> 8).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):  # of a PNG: one value stands for nothing
        grey[values == transparent] = _WHITE
    return Image.fromarray(grey).convert("RGB")


def _stretched(image: Image.Image) -> Image.Image:
    values = np.asarray(image, dtype=np.float32)
    least, greatest = values.min(), values.max()
    if not np.isfinite(greatest - least):
        raise ValueError(f"values from {least} to {greatest}")
    span = greatest - least or 1.0
    return Image.fromarray(np.rint((values - least) / span * _WHITE).astype(np.uint8)).convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    layered = image.convert("RGBA")
    paper = Image.new("RGB", image.size, (_WHITE, _WHITE, _WHITE))
    paper.paste(layered, mask=layered.getchannel("A"))
    return paper
