"""Checks that all sides compute the same thing; no figure is printed unless they do.

Log-probs of every response token, then one optimizer step from the same weights against log-probs of an older policy
(on-policy the GRPO loss is the mean of the advantages, which proves nothing): its loss and the norm of its gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.ours import KINDS, Key, Ours
from benchmarks.plain_papo import PlainPapo
from benchmarks.rows import Row
from benchmarks.trl_grpo import Trl, given_rollouts
from megatron_papo.types import Group

TOLERANCE = 1e-4
"""Largest difference: in nats for log-probs and losses, relative for the norm of the gradient."""
OLD_POLICY_STD = 0.5
"""Nats by which the older policy's log-probs differ: enough for every clip to act."""


class SidesDiffer(AssertionError):
    """The sides do not compute the same, so their times cannot be compared."""


def check_logprobs(ours: Ours, plain: PlainPapo, trl: Trl | None, groups: Sequence[Group]) -> list[Row]:
    """The largest difference of a response token's log-prob between our side and each other, from the same weights."""
    own = ours.logprobs(groups)
    others = {"plain": plain.logprobs(groups)}
    if trl is not None:
        others["TRL"] = trl.logprobs(_given(ours, groups), groups)
    # torch's maximum keeps a NaN, Python's may not
    gaps = {
        name: float(torch.stack([(own[key] - other[key]).abs().max() for key in own]).max())
        for name, other in others.items()
    }
    return [checked(f"agreement: log-probs, ours against {name}", gap, "nats") for name, gap in gaps.items()]


def check_updates(ours: Ours, plain: PlainPapo, trl: Trl | None, groups: Sequence[Group]) -> list[Row]:
    """Losses and gradient norms of one step of each kind, each side from the folder's weights; they have them again
    afterwards."""
    random = torch.Generator().manual_seed(0)
    own = plain.logprobs(groups)
    old = {key: value + OLD_POLICY_STD * torch.randn(value.shape, generator=random) for key, value in own.items()}
    rows = []
    for kind in KINDS:
        metrics = ours.update(kind, groups, old)
        updates = {"plain": plain.update(kind, groups, old)}
        if trl is not None and kind == "GRPO":
            updates["TRL"] = trl.update(_given(ours, groups, old))
        loss, norm = metrics["loss/total"][0], metrics["optim/grad_norm"][0]
        for name, (other_loss, other_norm) in updates.items():
            what = f"agreement: {kind}, ours against {name}"
            rows.append(checked(f"{what}, loss", abs(loss - other_loss), "nats"))
            rows.append(checked(f"{what}, norm of the gradient", abs(norm - other_norm) / other_norm, "relative"))
        for side in (ours, plain, trl):
            if side is not None:
                side.reset()
    return rows


def _given(ours: Ours, groups: Sequence[Group], old: dict[Key, Tensor] | None = None) -> dict:
    tokenizer = ours.run.processor.tokenizer
    return given_rollouts(groups, ours.run.shape.image_token_id, tokenizer.pad_token_id, old)


def checked(name: str, gap: float, unit: str) -> Row:
    """A row with the difference and its limit. Raises SidesDiffer where the difference is larger or not a number."""
    if not gap <= TOLERANCE:
        raise SidesDiffer(f"{name}: {gap:.2e}, allowed {TOLERANCE:.0e}")
    return Row(name, gap, TOLERANCE, gap / TOLERANCE, unit)
