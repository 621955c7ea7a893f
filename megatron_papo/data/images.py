"""Images as datasets hold them: to compressed bytes, and from bytes to pixels.

A cell may hold one image or a list of them, each as bytes, a path, a dict of the two (how `datasets` stores an image
it has not decoded) or a PIL image. Compressed bytes are what is kept; pixels live as long as a step. Transparency is
dropped (RGB values under it count), as the common training codes do; EXIF rotation is applied, as `datasets` does.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps


class ImageFileMissing(ValueError):
    """A path in the images column leads nowhere."""


def image_bytes(cell: Any, folder: Path | None) -> tuple[bytes, ...]:
    """Compressed bytes of every image of a cell, in order; relative paths start at `folder`.

    Raises ImageFileMissing, or ValueError for a value that is no image.
    """
    if cell is None:
        return ()
    items = cell if isinstance(cell, (list, tuple)) else [cell]
    return tuple(_one(item, folder) for item in items)


def decode_image(data: bytes) -> Image.Image:
    """RGB pixels; raises ValueError for anything that cannot be decoded to its last row."""
    try:
        with Image.open(io.BytesIO(data)) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and more, by format
        raise ValueError(f"{type(error).__name__}: {error}") from None


def _one(item: Any, folder: Path | None) -> bytes:
    if isinstance(item, dict) and {"bytes", "path"} & set(item):
        item = item.get("bytes") or item.get("path")
    if isinstance(item, (bytes, bytearray, memoryview)):
        return bytes(item)
    if isinstance(item, Image.Image):
        buffer = io.BytesIO()
        item.save(buffer, format="PNG")
        return buffer.getvalue()
    if isinstance(item, str) and item:
        path = (folder or Path()) / item
        try:
            return path.read_bytes()
        except OSError as error:
            raise ImageFileMissing(f"{path}: {error.strerror}") from None
    raise ValueError(f"neither bytes, path nor picture: {type(item).__name__}")
