"""Rotary embeddings: M-RoPE for the language model, 2-D for the vision tower, and the rotation itself.

Angles are fp32 and computed once per micro-batch. Queries and keys are rotated within the attention function, in two
passes over each. Nothing is saved for backward, which rotates the gradients back.
Suffixes: T places of a row, N heads, D values of a head, F = D / 2 frequencies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_papo.types import to_device


@dataclass(frozen=True)
class Rotation:
    """The angle by which each place of a row turns value f of a head's first half with value f of its second half."""

    cos_T1F: Tensor
    sin_T1F: Tensor

    @classmethod
    def by(cls, angles_TF: Tensor) -> Rotation:
        """The rotation by these angles, in radians."""
        return cls(angles_TF.cos().unsqueeze(1), angles_TF.sin().unsqueeze(1))

    def turn(self, values_TND: Tensor) -> Tensor:
        """Queries or keys, rotated."""
        return self._turn(values_TND, 1)

    def rotate_inverse(self, values_TND: Tensor) -> Tensor:
        """Values rotated back, which turns gradients of rotated values into those of the values before."""
        return self._turn(values_TND, -1)

    def _turn(self, values_TND: Tensor, sign: int) -> Tensor:
        cos, sin = (part.to(values_TND.dtype) for part in (self.cos_T1F, self.sin_T1F))
        turned = torch.empty_like(values_TND)
        (first, second), (to_first, to_second) = values_TND.chunk(2, -1), turned.chunk(2, -1)
        torch.mul(first, cos, out=to_first).addcmul_(second, sin, value=-sign)
        torch.mul(second, cos, out=to_second).addcmul_(first, sin, value=sign)
        return turned


def mrope(
    position_ids_3T: Tensor, *, head_dim: int, theta: float, sections: tuple[int, int, int], interleaved: bool = False
) -> Rotation:
    """Rotary embedding in three axes; `sections` are the numbers of frequencies for time, height and width.

    Each axis has one run of frequencies. With `interleaved` the axes take frequencies in turn, as long as height and
    width have some left; the rest belongs to time.
    """
    axes = (
        interleaved_axes(sections) if interleaved else [axis for axis, num in enumerate(sections) for _ in range(num)]
    )
    axis_F = to_device(torch.tensor(axes), position_ids_3T.device)
    positions_TF = position_ids_3T.float().index_select(0, axis_F).T
    return Rotation.by(positions_TF * _inverse_frequencies(head_dim, theta, position_ids_3T.device))


def interleaved_axes(sections: tuple[int, int, int]) -> list[int]:
    """The axis (0 time, 1 height, 2 width) of each frequency, where the axes take frequencies in turn."""
    axes = [0] * sum(sections)
    for axis in (1, 2):
        places = slice(axis, 3 * sections[axis], 3)
        axes[places] = [axis] * len(axes[places])
    return axes


def vision_rotation(positions_P2: Tensor, *, head_dim: int, theta: float) -> Rotation:
    """Rotary embedding in two axes: half of the frequencies belongs to the row of a patch, half to its column."""
    frequencies = _inverse_frequencies(head_dim // 2, theta, positions_P2.device)
    return Rotation.by((positions_P2.float()[:, :, None] * frequencies).flatten(1))


def _inverse_frequencies(dim: int, theta: float, device: torch.device) -> Tensor:
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim))
