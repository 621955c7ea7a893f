"""The geometry of images: places of patches and the interpolation of learned positions equal those of transformers."""

from __future__ import annotations

import pytest
import torch
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from megatron_papo.model.patch_grid import patch_places
from megatron_papo.model.qwen3_vl.patches import interpolate

GRIDS = [(1, 2, 2), (1, 2, 14), (1, 34, 6), (3, 4, 8), (1, 48, 48), (1, 96, 62), (1, 50, 2)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("merge", [1, 2])
def test_places_of_patches_in_the_processors_order(grid: tuple[int, int, int], merge: int):
    theirs = get_vision_position_ids(torch.tensor([grid]), merge)
    assert torch.equal(torch.from_numpy(patch_places(*grid, merge)), theirs)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("edge", [6, 48])
def test_learned_positions_are_interpolated_by_the_same_shares(grid: tuple[int, int, int], edge: int):
    theirs = get_vision_interpolation_indices_and_weights(
        torch.tensor([grid]), edge, mode="bilinear", align_corners=True, spatial_merge_size=2
    )
    for found, expected in zip(interpolate(*grid, merge=2, edge=edge), theirs):
        torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-6, rtol=0)


def test_the_corners_of_an_image_lie_on_the_corners_of_the_learned_grid():
    corners, shares = interpolate(1, 4, 6, merge=2, edge=6)
    patches = [tuple(place) for place in patch_places(1, 4, 6, 2).tolist()]
    for patch, place in {(0, 0): 0, (0, 5): 5, (3, 0): 30, (3, 5): 35}.items():
        index = patches.index(patch)
        assert corners[index][shares[index] == 1.0].tolist() == [place]
