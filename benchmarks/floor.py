"""The least time that a batch's arithmetic can take on this machine: useful FLOPs at the speed of a large matrix
product.

Useful work is what the model cannot do without (`megatron_papo.costs.flops`): a prompt once a group, causal attention,
logits of response tokens; backward twice the forward. Leaves out everything that is no product.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from functools import cache

import torch

from megatron_papo.costs.flops import group_flops
from megatron_papo.model.shape import ModelShape
from megatron_papo.types import Group

_EDGE = 1024


def update_flops(groups: Sequence[Group], kind: str, shape: ModelShape) -> int:
    """Useful FLOPs of an update: forward and backward, in both views when the branch is joint, plus forward of the
    masked view when it is frozen."""
    one_pass = sum(
        group_flops(
            group.prompt.inputs.token_ids_S.numel(),
            [len(rollout.response_ids) for rollout in group.rollouts],
            group.prompt.inputs.grid_thw_I3.tolist() if group.prompt.inputs.grid_thw_I3 is not None else [],
            shape,
        ).total
        for group in groups
    )
    return one_pass * {"GRPO": 3, "PAPO frozen": 4, "PAPO joint": 6}[kind]


@cache
def flops_per_s() -> float:
    """FLOP/s of a square fp32 matrix product on one thread: the median of eleven, in processor seconds."""
    left, right = torch.randn(2, _EDGE, _EDGE)
    seconds = []
    for _ in range(11):
        before = time.process_time()
        torch.mm(left, right)
        seconds.append(time.process_time() - before)
    return 2 * _EDGE**3 / statistics.median(seconds)
