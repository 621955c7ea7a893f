"""M-RoPE positions of a prompt with still images: text counts on by one, an image takes up its grid.

Several families count in this way; their modules `positions` call it. Source: arXiv 2409.12191, section 2.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_papo.model.shape import ModelShape


def image_grid_positions(token_ids_S: Tensor, grid_thw_I3: Tensor | None, shape: ModelShape) -> Tensor:
    """The positions of a prompt, [3, S] int64, by `mrope_positions` for a model of `shape`."""
    return mrope_positions(
        token_ids_S,
        grid_thw_I3,
        image_token_id=shape.image_token_id,
        merge_size=shape.vision.spatial_merge_size,
    )


def mrope_positions(token_ids_S: Tensor, grid_thw_I3: Tensor | None, *, image_token_id: int, merge_size: int) -> Tensor:
    """[3, S] int64 positions (time, height, width) of a sequence with still images.

    A text token advances all three by one. An image takes up its merged grid from the next position on, and the text
    after it continues behind the grid's longer edge. Raises ValueError, with the counts, when the runs of image tokens
    and the grids do not match.
    """
    grids = [] if grid_thw_I3 is None else grid_thw_I3.tolist()
    sizes = [time * height * width // merge_size**2 for time, height, width in grids]
    is_image_S = token_ids_S == image_token_id
    if int(is_image_S.sum()) != sum(sizes):
        raise ValueError(f"{int(is_image_S.sum())} image tokens for {len(grids)} images of {sizes} tokens")
    parts: list[Tensor] = []
    place = position = 0
    image_places = is_image_S.nonzero()[:, 0].tolist()
    for index, ((time, height, width), size) in enumerate(zip(grids, sizes)):
        first = image_places[sum(sizes[:index])]
        if time != 1 or not is_image_S[first : first + size].all():
            raise ValueError(f"image {index} of grid {(time, height, width)} is not one run of {size} image tokens")
        text = first - place
        parts += [_text_positions(position, text), _grid_positions(position + text, height, width, merge_size)]
        place, position = first + size, position + text + max(height, width) // merge_size
    parts.append(_text_positions(position, token_ids_S.numel() - place))
    return torch.cat(parts, dim=1)


def _text_positions(start: int, length: int) -> Tensor:
    return torch.arange(start, start + length).expand(3, -1)


def _grid_positions(start: int, height: int, width: int, merge_size: int) -> Tensor:
    rows, columns = height // merge_size, width // merge_size
    times = torch.zeros(rows * columns, dtype=torch.int64)
    return start + torch.stack(
        [times, torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)]
    )
