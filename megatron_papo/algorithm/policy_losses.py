"""Policy losses by name: what the setting `loss.policy_loss` chooses from.

To add one, write a function of the type `PolicyLoss`, enter it in `POLICY_LOSSES`, and add its name to
`LossConfig.policy_loss`, which refuses every other name; a test compares the two. What needs a whole response, such as
the ratio of a sequence, finds its reductions in `sequences.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_papo.algorithm.estimators import probability_ratio
from megatron_papo.config import LossConfig
from megatron_papo.types import MicroBatch

PolicyLoss = Callable[[Tensor, Tensor, Tensor, MicroBatch, LossConfig], Tensor]
"""(policy_R, old_R, advantages_R, row, loss) -> [R], the loss of each response token before it is weighted.

`policy_R` carries the gradient. `old_R`: log-probs that the ratio is taken against. `advantages_R`: those of `row`
after the step of credit (`credit.py`); read these, not the row's own.
"""


def clipped(policy_R: Tensor, old_R: Tensor, advantages_R: Tensor, row: MicroBatch, loss: LossConfig) -> Tensor:
    """max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high)), for A < 0 no worse than -A dual_clip (PPO, arXiv
    1707.06347, with two bounds as in DAPO, arXiv 2503.14476; dual clip, arXiv 1912.09729)."""
    ratio_R = probability_ratio(policy_R, old_R)
    clipped_R = ratio_R.clamp(1 - loss.clip_low, 1 + loss.clip_high)
    worst_R = torch.maximum(-advantages_R * ratio_R, -advantages_R * clipped_R)
    if loss.dual_clip is None:
        return worst_R
    return torch.where(advantages_R < 0, torch.minimum(worst_R, -advantages_R * loss.dual_clip), worst_R)


POLICY_LOSSES: dict[str, PolicyLoss] = {"clipped": clipped}
