"""Pictures of every mode as pixels of 8 bits: what somebody sees who opens them."""

import io

import numpy as np
import pytest
from PIL import Image

from megatron_papo.data.images import BadImage, decode_image

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def decoded(image, kind="PNG", **how):
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **how)
    return np.asarray(decode_image(buffer.getvalue()))


def wide(values, order="<"):
    """16 bits a pixel."""
    mode = "I;16B" if order == ">" else "I;16"
    return Image.frombytes(mode, values.shape[::-1], values.astype(f"{order}u2").tobytes())


@pytest.mark.parametrize("times", [256, 257])
@pytest.mark.parametrize(("kind", "order"), [("PNG", "<"), ("TIFF", "<"), ("TIFF", ">")])
def test_grey_of_16_bits_is_the_grey_it_was_made_from(times, kind, order):
    grey = decoded(wide(RAMP.astype(np.uint16) * times, order), kind)
    assert grey.shape == (16, 16, 3) and (grey == RAMP[..., None]).all()


def test_numbers_without_a_white_are_stretched():
    for values in (RAMP.astype(np.int32) * 1000 - 7, RAMP.astype(np.float32) / 255, RAMP.astype(np.float32) * 1e9):
        assert (decoded(Image.fromarray(values), "TIFF") == RAMP[..., None]).all()
    assert (decoded(Image.fromarray(np.full((4, 4), 7, np.int32)), "TIFF") == 0).all()
    with pytest.raises(BadImage, match="values from nan"):
        decoded(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF")


def drawing():
    """A black stroke on transparency whose hidden pixels are black too; half of it half transparent."""
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[0, :, 3] = 255, 255, 128, 128
    return Image.fromarray(pixels)


@pytest.mark.parametrize(("kind", "how"), [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True, "exact": True})])
def test_what_is_transparent_shows_white(kind, how):
    seen = decoded(drawing(), kind, **how)
    assert seen[0].tolist() == [[0] * 3] * 2 + [[127] * 3] * 2 and (seen[1:] == 255).all()


def test_every_way_to_write_transparency():
    grey = drawing().convert("LA")
    assert decoded(grey)[0, :, 0].tolist() == [0, 0, 127, 127] and (decoded(grey)[1:] == 255).all()
    black = Image.new("L", (4, 4))
    named = [(black, 0), (black.convert("P"), 0), (black.convert("RGB"), (0, 0, 0)), (black.convert("1"), 0)]
    named.append((wide(np.zeros((4, 4))), 0))
    for image, colour in named:
        assert (decoded(image) == 0).all() and (decoded(image, transparency=colour) == 255).all(), image.mode
    assert (decoded(black.convert("P"), transparency=b"\x80") == 127).all(), "a share for each colour of a palette"
    assert (decoded(drawing(), "GIF")[1:] == 255).all()


def test_other_modes_and_the_way_a_camera_was_held():
    assert (decoded(Image.new("CMYK", (4, 4), (0, 0, 0, 255)), "JPEG") < 5).all()
    assert (decoded(Image.fromarray(RAMP > 127)) == np.where(RAMP > 127, 255, 0)[..., None]).all()
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter turn
    image = Image.merge("RGBA", [Image.fromarray(RAMP)] * 3 + [Image.new("L", (16, 16), 255)])
    assert (decoded(image, exif=turned)[..., 0] == np.rot90(RAMP, -1)).all()
