"""Sums over a tile of logits, and the tile's gradient, in plain torch: any device, fp32 and fp64.

Both functions overwrite the logits they are given, a strip of rows at a time: the temporaries of a strip stay in cache
and in memory that the allocator reuses, while those of a whole tile are mapped anew each time, which is several times
slower. `triton_tile.py` has the same two functions for CUDA.
Suffixes: C rows of a tile, W its words, N views.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatron_papo.logprobs.gradients import RowPulls
from megatron_papo.logprobs.sums import RowSums

_STRIP = 64 * 1024
"""Number of logits in a strip."""


def tile_sums(logits: Sequence[Tensor], scale: float, columns_C: Tensor, entropy: bool) -> RowSums:
    """Sums over the words of one tile, of one view or two.

    logits: N tensors [C, W], to be multiplied by `scale`. columns_C: place of each row's target word in the tile, -1
    when it is not in this tile. Without `entropy`, `dot` is 0.
    """
    strips = [_strip_sums([one[rows] for one in logits], scale, columns_C[rows], entropy) for rows in _strips(logits)]
    return RowSums.side_by_side(strips)


def _strips(logits: Sequence[Tensor]) -> Iterator[slice]:
    num_rows, num_words = logits[0].shape
    size = max(1, _STRIP // num_words)
    return (slice(first, first + size) for first in range(0, num_rows, size))


def _strip_sums(logits: Sequence[Tensor], scale: float, columns_C: Tensor, entropy: bool) -> RowSums:
    place_C1, in_tile_C = columns_C.clamp(min=0)[:, None], columns_C >= 0
    for logits_CW in logits:
        logits_CW.mul_(scale)
    max_NC = torch.stack([logits_CW.amax(-1) for logits_CW in logits])
    target_NC = torch.stack([logits_CW.gather(1, place_C1)[:, 0].where(in_tile_C, 0) for logits_CW in logits])
    for logits_CW, max_C in zip(logits, max_NC):
        logits_CW.sub_(max_C[:, None])
    if len(logits) == 1 and not entropy:
        exp_NC = logits[0].exp_().sum(-1)[None]
        return RowSums(max_NC, exp_NC, torch.zeros_like(exp_NC), target_NC)
    exps = [logits_CW.exp() for logits_CW in logits]
    exp_NC = torch.stack([exp_CW.sum(-1) for exp_CW in exps])
    dot_NC = torch.zeros_like(exp_NC)
    if entropy:
        dot_NC = torch.stack([(logits_CW * exp_CW).sum(-1) for logits_CW, exp_CW in zip(logits, exps)])
    if len(logits) == 1:
        return RowSums(max_NC, exp_NC, dot_NC, target_NC)
    gap_CW = logits[0].sub_(logits[1])
    gap_C = torch.mul(exps[0], gap_CW, out=logits[1]).sum(-1)
    # exp(b) - exp(a) = (exp(a) + exp(b)) tanh((b - a) / 2), which keeps its digits when a and b are nearly equal
    excess_C = exps[0].add_(exps[1]).mul_(gap_CW.mul_(-0.5).tanh_()).sum(-1)
    return RowSums(max_NC, exp_NC, dot_NC, target_NC, gap_C, excess_C)


def tile_gradients(
    logits: Sequence[Tensor], scale: float, columns_C: Tensor, pulls: RowPulls, dtype: torch.dtype
) -> list[Tensor]:
    """Gradients of the logits of one tile, [C, W] each in `dtype`; the arguments are those of `tile_sums`."""
    for rows in _strips(logits):
        _strip_gradients([one[rows] for one in logits], scale, columns_C[rows], pulls.rows(rows))
    return [one.to(dtype) for one in logits]


def _strip_gradients(logits: Sequence[Tensor], scale: float, columns_C: Tensor, pulls: RowPulls) -> None:
    for logits_CW, normaliser_C in zip(logits, pulls.normaliser_NR):
        logits_CW.mul_(scale).sub_(normaliser_C[:, None])
    if pulls.kl_R is not None:
        _pair_gradients(logits, pulls)
    elif pulls.slope_NR is None:
        logits[0].exp_().mul_(pulls.constant_NR[0, :, None])
    else:
        p_CW = logits[0].exp()
        logits[0].mul_(pulls.slope_NR[0, :, None]).add_(pulls.constant_NR[0, :, None]).mul_(p_CW)
    place_C1, in_tile_C = columns_C.clamp(min=0)[:, None], columns_C >= 0
    for logits_CW, target_C in zip(logits, pulls.target_NR):
        logits_CW.scatter_add_(1, place_C1, target_C.where(in_tile_C, 0)[:, None])


def _pair_gradients(logits: Sequence[Tensor], pulls: RowPulls) -> None:
    assert pulls.kl_R is not None
    logp_CW, logq_CW = logits
    kl_C1 = pulls.kl_R[:, None]
    p_CW, q_CW = logp_CW.exp(), logq_CW.exp()
    gap_CW = (logp_CW - logq_CW).mul_(kl_C1)
    slopes = (None, None) if pulls.slope_NR is None else pulls.slope_NR
    for log_CW, constant_C, slope_C in zip(logits, pulls.constant_NR, slopes):
        if slope_C is None:
            log_CW.copy_(constant_C[:, None])
        else:
            log_CW.mul_(slope_C[:, None]).add_(constant_C[:, None])
    logp_CW.add_(gap_CW).mul_(p_CW)
    logq_CW.mul_(q_CW).add_(q_CW.sub_(p_CW).mul_(kl_C1))
