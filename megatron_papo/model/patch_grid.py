"""The order in which the processors of several families lay out the patches of an image: block by block.

The merge x merge patches that become one token lie together, row by row; blocks follow one another row by row too.
"""

from __future__ import annotations

import numpy as np


def block_grid(frames: int, height: int, width: int, merge: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The frame, row and column, in blocks, of every block of an image of `frames` x `height` x `width` patches, in the
    processor's order."""
    axes = np.meshgrid(*map(np.arange, (frames, height // merge, width // merge)), indexing="ij")
    time, row, column = (axis.reshape(-1) for axis in axes)
    return time, row, column


def patch_places(frames: int, height: int, width: int, merge: int) -> np.ndarray:
    """[P, 2] the row and column of every patch of such an image, in the processor's order."""
    _, row, column = block_grid(frames, height, width, merge)
    inside = np.arange(merge**2)
    rows, columns = row[:, None] * merge + inside // merge, column[:, None] * merge + inside % merge
    return np.stack([rows, columns], axis=-1).reshape(-1, 2)
