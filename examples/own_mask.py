"""A mask of one's own for the perception term: the picture as a mosaic, coarse enough that no text can be read.

`perception.mask.function: examples.own_mask:mosaic` uses it. `papo` finds the module when it is started in the folder
that holds `examples`; `papo data CONFIG.yaml` shows what it makes of a picture.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

TILES = 6
"""Along the shorter edge."""


def mosaic(image: Image.Image, rng: np.random.RandomState) -> Image.Image:
    """The same picture in tiles of one colour each, in RGB and its own size, with some tiles black by chance."""
    edge = max(1, min(image.size) // TILES)
    columns, rows = -(-image.width // edge), -(-image.height // edge)
    colours = np.array(image.resize((columns, rows), Image.Resampling.BOX))
    colours[rng.random_sample((rows, columns)) < 0.2] = 0
    tiles = Image.fromarray(colours).resize((columns * edge, rows * edge), Image.Resampling.NEAREST)
    return tiles.crop((0, 0, *image.size))
