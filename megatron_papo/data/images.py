"""Images as datasets hold them: to compressed bytes, and from bytes to pixels.

A cell may hold one image or a list of them, each as bytes, base64 (a `data:` address, or the text alone), a path or a
dict of those (how `datasets` stores an image it has not decoded, and how chat interfaces write one); bytes win.
Compressed bytes are kept; pixels live as long as a step. How pixels become RGB is in `pixels.py`.

Bytes are not trusted: only the formats below are tried (Pillow knows others that start programs), and the size that a
header states is checked before any pixel is decoded.
"""

from __future__ import annotations

import binascii
import io
import re
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from megatron_papo.config import MOST_IMAGE_PIXELS
from megatron_papo.data.image_files import BadImage, ImageFiles, check_size
from megatron_papo.data.pixels import rgb
from megatron_papo.text.untrusted import shortened

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""What is opened; MPO, which many phones write, is opened as JPEG."""
_BYTES_OF_A_PIXEL = 4
"""No file of a picture needs more, compressed or not, but for its metadata."""
_METADATA_BYTES = 2**20
_MOST_SCANS = 100
"""Encoders write about ten."""
_START, _END, _SCAN = b"\xff\xd8", b"\xff\xd9", b"\xff\xda"
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")
"""A marker of a JPEG, except those that may occur in the data of a scan."""
_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)
"""The entry of EXIF that says how a camera was held, and its values that make height of width."""
_DATA_ADDRESS = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE)
_BASE64 = re.compile(r"(?:iVBORw0KGgo|/9j/|UklGR|R0lGOD|SUkq|TU0A|Qk)[A-Za-z0-9+/\s]{32,}+={0,2}+\s*+")
"""Base64 of a picture's bytes: it begins as one of `FORMATS` does, and no file name is so long without a dot. The
expression reads any text only once."""


def image_items(cell: Any) -> list[Any]:
    """The images of a cell, in order, as the data set holds each. An empty text, which CSV has for nothing, is none."""
    if cell is None or cell == "":
        return []
    return list(cell) if isinstance(cell, (list, tuple)) else [cell]


def image_bytes(items: list[Any], files: ImageFiles, max_pixels: int) -> tuple[bytes, ...]:
    """Compressed bytes of every image of a row. Together they take no more than one picture of `max_pixels` may.

    Raises BadImage.
    """
    room = max_pixels * _BYTES_OF_A_PIXEL + _METADATA_BYTES
    pictures: list[bytes] = []
    for item in items:
        pictures.append(_one(item, files, room))
        room -= len(pictures[-1])
    return tuple(pictures)


def decode_image(data: bytes, max_pixels: int = MOST_IMAGE_PIXELS) -> Image.Image:
    """RGB pixels of the first frame; raises BadImage for too many, and for what cannot be decoded to its last row."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            if opened.width * opened.height > max_pixels:
                size = f"{opened.width} x {opened.height} pixels, data.max_image_pixels is {max_pixels}"
                raise BadImage("image too large", size)
            if opened.format in ("JPEG", "MPO") and _num_scans(data) > _MOST_SCANS:
                raise BadImage("corrupt image", f"more than {_MOST_SCANS} scans of one JPEG")
            ImageOps.exif_transpose(opened, in_place=True)
            return rgb(opened)
    except (BadImage, MemoryError, RecursionError):
        raise
    except Image.DecompressionBombError as error:
        raise BadImage("image too large", str(error)) from None
    except UnidentifiedImageError:  # whose own text is another in every process
        raise BadImage("corrupt image", f"none of {', '.join(FORMATS)}") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and more, by format
        raise BadImage("corrupt image", f"{type(error).__name__}: {shortened(error, 200)}") from None


def image_size(data: bytes) -> tuple[int, int]:
    """Width and height of a picture that can be decoded, as `decode_image` gives it, without decoding it."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
        width, height = opened.size
        return (height, width) if opened.getexif().get(_ORIENTATION) in _TURNED else (width, height)


def _num_scans(data: bytes) -> int:
    """Number of scans of a JPEG's first picture. Each scan goes over all pixels, and 50 bytes of a
    progressive JPEG can ask for one."""
    at = num = 0
    while (marker := _MARKER.search(data, at)) and marker[0] != _END:
        at = marker.end()
        if marker[0] != _START:
            at += max(2, int.from_bytes(data[at : at + 2]))  # the length of the marker's own bytes
        num += marker[0] == _SCAN
    return num


def _one(item: Any, files: ImageFiles, max_bytes: int) -> bytes:
    if isinstance(item, dict):
        item = _named_in(item)
    if isinstance(item, (bytes, bytearray, memoryview)):
        check_size("the row's images", len(item), max_bytes)
        return bytes(item)
    if isinstance(item, str) and item:
        text = _base64_in(item)
        return files.read(item, max_bytes) if text is None else _from_base64(text, max_bytes)
    raise BadImage("corrupt image", f"neither bytes nor path: {type(item).__name__}")


def _named_in(item: dict[str, Any]) -> Any:
    """What a dict holds of a picture: bytes before a path before what a message of a chat has."""
    for name in ("bytes", "path", "image", "image_url", "url"):
        if value := item.get(name):
            return _named_in(value) if isinstance(value, dict) and name == "image_url" else value
    return item


def _base64_in(item: str) -> str | None:
    """The base64 of a picture that is written out; None for a path."""
    if address := _DATA_ADDRESS.match(item):
        return item[address.end() :]
    return item if _BASE64.fullmatch(item) else None


def _from_base64(text: str, max_bytes: int) -> bytes:
    """Three bytes from four letters, but for the breaks between lines."""
    text = "".join(text.split())
    check_size("the row's images", len(text) // 4 * 3, max_bytes)
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except ValueError as error:
        raise BadImage("corrupt image", f"{len(text)} letters of base64: {error}") from None
