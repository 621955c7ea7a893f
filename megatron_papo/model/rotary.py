"""Rotary angles: M-RoPE of the language model, 2-D of the vision tower. fp32, in Megatron's layout [T, 1, 1, D]."""

from __future__ import annotations

import torch
from torch import Tensor


def mrope_angles(position_ids_3T: Tensor, *, head_dim: int, theta: float, sections: tuple[int, int, int]) -> Tensor:
    """Angles [T, 1, 1, head_dim]: the first frequencies turn with time, then height, then width, by `sections`."""
    axis = torch.repeat_interleave(torch.arange(3), torch.tensor(sections)).to(position_ids_3T.device)
    positions_TF = position_ids_3T.float().index_select(0, axis).T
    return _twice(positions_TF * _inverse_frequencies(head_dim, theta, position_ids_3T.device))


def vision_angles(positions_P2: Tensor, *, head_dim: int, theta: float) -> Tensor:
    """Angles [P, 1, 1, head_dim]: one half of the frequencies turns with the row of a patch, one with its column."""
    frequencies = _inverse_frequencies(head_dim // 2, theta, positions_P2.device)
    return _twice((positions_P2.float()[:, :, None] * frequencies).flatten(1))


def _inverse_frequencies(dim: int, theta: float, device: torch.device) -> Tensor:
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim))


def _twice(angles_TF: Tensor) -> Tensor:
    """Both halves of a head turn by the same angles."""
    return torch.cat((angles_TF, angles_TF), dim=-1)[:, None, None, :]
