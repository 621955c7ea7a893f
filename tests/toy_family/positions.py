"""The toy family's positions: after an image text goes on past its rows and its columns."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_papo.model.shape import ModelShape


def prompt_positions(token_ids_S: Tensor, grid_thw_I3: Tensor | None, shape: ModelShape) -> Tensor:
    """[3, S] int64; an image token stands at its row and column from the image's first position on."""
    parts, position, grids = [], 0, iter([] if grid_thw_I3 is None else grid_thw_I3.tolist())
    values, counts = torch.unique_consecutive(token_ids_S == shape.image_token_id, return_counts=True)
    for is_image, count in zip(values.tolist(), counts.tolist()):
        if not is_image:
            parts.append(torch.arange(position, position + count).expand(3, -1))
            position += count
            continue
        _, height, width = next(grids, (0, 0, 0))
        rows, columns = height // 2, width // 2
        if rows * columns != count:
            raise ValueError(f"{count} image tokens in a run for a grid of {rows} x {columns} tokens")
        places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).T
        parts.append(position + torch.cat([torch.zeros(1, count, dtype=torch.int64), places]))
        position += rows + columns
    return torch.cat(parts, dim=1)
