"""The objective once more, a token at a time in Python's floats, against `papo_loss` over random settings and rows.

The second writing shares no code with the first. Its gradient is that of central differences.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_papo.algorithm.loss_settings import LossSettings
from megatron_papo.algorithm.losses import papo_loss
from megatron_papo.config import Config
from megatron_papo.types import HeadOutputs, MicroBatch, Segment

LENGTHS = (4, 1, 3)
"""Of the responses; the second prompt has no image."""
RESPONSE = [place for place, length in enumerate(LENGTHS) for _ in range(length)]
SEEN = [place != 1 for place in RESPONSE]
STEPS = 4
"""Of gamma's schedule."""


def _settings(rng: random.Random) -> dict[str, Any]:
    loss: dict[str, Any] = {
        "perception_coef": rng.choice([0.0, 0.02, 0.5]), "reference_coef": rng.choice([0.0, 0.1]),
        "entropy_coef": rng.choice([0.0, 0.03]), "masked_entropy_coef": rng.choice([0.0, 0.05]),
        "clip_low": rng.choice([0.1, 0.2]), "clip_high": rng.choice([0.28, 0.3]),
        "dual_clip": rng.choice([None, 1.5, 3.0]), "old_logprobs": rng.choice(["recomputed", "rollout"]),
    }  # fmt: skip
    if loss["old_logprobs"] == "recomputed":
        loss["correction"] = rng.choice(["none", "truncated", "masked"])
        loss["correction_level"] = rng.choice(["token", "sequence"])
    perception = {
        "masked_branch": rng.choice(["frozen", "joint"]), "clamp": rng.choice([None, 0.2]),
        "top_fraction": rng.choice([1.0, 0.5]),
    }  # fmt: skip
    if rng.random() < 0.5:
        perception |= {"coef_end": rng.choice([0.0, 0.3]), "coef_steps": STEPS}
    return {"loss": loss, "perception": perception}


def _values(rng: random.Random, first_update: bool) -> dict[str, list[float]]:
    """Log-probs of each party; far enough from the old ones for every clip to act."""

    def near(values: list[float], spread: float) -> list[float]:
        return [value + rng.gauss(0.0, spread) for value in values]

    old = [rng.uniform(-3.0, -0.2) for _ in RESPONSE]
    return {
        "policy": old if first_update else near(old, 0.6), "old": old, "engine": near(old, 0.5),
        "reference": near(old, 0.7), "masked": near(old, 1.0),
        "advantage": [(1.3, -0.7, 0.0)[(place + rng.randrange(3)) % 3] for place in RESPONSE],
    }  # fmt: skip


def _written_again(values: dict[str, list[float]], tree: dict[str, Any], step: int, guard: float) -> float:
    loss, perception = Config.model_validate(tree).loss, Config.model_validate(tree).perception
    gamma, share = loss.perception_coef, 1.0
    if perception.coef_end is not None:
        walked = min(step / STEPS, 1.0)
        gamma = (1 - walked) * loss.perception_coef + walked * perception.coef_end
        highest = max(loss.perception_coef, perception.coef_end)
        share = gamma / highest if highest else 1.0
    num, num_seen, total = len(RESPONSE), sum(SEEN), 0.0
    chosen = _chosen(values, perception.top_fraction)
    for t in range(num):
        policy, masked = values["policy"][t], values["masked"][t]
        old = values["engine"][t] if loss.old_logprobs == "rollout" else values["old"][t]
        ratio, advantage = math.exp(policy - old), values["advantage"][t]
        kept = min(max(ratio, 1 - loss.clip_low), 1 + loss.clip_high)
        surrogate = min(advantage * ratio, advantage * kept)
        if advantage < 0 and loss.dual_clip is not None:
            surrogate = max(surrogate, advantage * loss.dual_clip)
        total -= _correction(values, t, loss) * surrogate / num
        total -= loss.entropy_coef * share * policy / num
        total += loss.reference_coef * _k3(values["reference"][t] - policy) / num
        if SEEN[t]:
            kl = _k3(masked - policy)
            kl = kl if perception.clamp is None else min(kl, perception.clamp)
            total -= gamma * guard * kl * (t in chosen) / num_seen
            total -= loss.masked_entropy_coef * share * masked / num_seen
    return total


def _k3(gap: float) -> float:
    return min(math.exp(gap) - gap - 1, 10.0)


def _chosen(values: dict[str, list[float]], fraction: float) -> set[int]:
    found: set[int] = set()
    for response, length in enumerate(LENGTHS):
        own = [t for t, place in enumerate(RESPONSE) if place == response]
        own.sort(key=lambda t: _k3(values["masked"][t] - values["policy"][t]), reverse=True)
        found.update(own[: math.ceil(fraction * length)])
    return found


def _correction(values: dict[str, list[float]], t: int, loss: Any) -> float:
    if loss.correction == "none":
        return 1.0
    own = [t] if loss.correction_level == "token" else [u for u, at in enumerate(RESPONSE) if at == RESPONSE[t]]
    ratio = math.exp(sum(values["old"][u] - values["engine"][u] for u in own) / len(own))
    if loss.correction == "truncated":
        return min(ratio, loss.correction_cap)
    return ratio if loss.correction_floor <= ratio <= loss.correction_cap else 0.0


def _row(values: dict[str, list[float]], scored: bool) -> MicroBatch:
    f64 = {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
    num, seen_R = len(RESPONSE), torch.tensor(SEEN)
    return MicroBatch(
        token_ids_T=torch.arange(num), position_ids_3T=torch.arange(num).expand(3, -1), segments=(Segment(num),),
        pixel_values=(), grid_thw_I3=None, target_ids_R=torch.arange(num), logit_index_R=torch.arange(num),
        rollout_index_R=torch.tensor(RESPONSE), loss_mask_R=torch.ones(num, dtype=torch.bool), has_image_R=seen_R,
        weights_R=torch.full((num,), 1 / num, dtype=torch.float64), perception_weights_R=seen_R.double() / seen_R.sum(),
        advantages_R=f64["advantage"], rollout_logprobs_R=f64["engine"], ref_logprobs_R=f64["reference"],
        old_logprobs_R=f64["old"] if scored else None, masked_logprobs_R=f64["masked"],
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(80))
def test_value_and_gradient_equal_those_of_the_objective_written_again(seed):
    rng = random.Random(seed)
    tree, step, guard, first = _settings(rng), rng.randrange(2 * STEPS), rng.choice([1.0, 0.25]), rng.random() < 0.3
    config, values = Config.model_validate(tree), _values(rng, first)
    settings = replace(LossSettings.at_step(config, step, guard), first_update=first)
    row = _row(values, scored=not first and config.loss.old_logprobs == "recomputed")
    leaves = {
        name: torch.tensor(values[name], dtype=torch.float64, requires_grad=True) for name in ("policy", "masked")
    }
    total, _ = papo_loss(HeadOutputs(leaves["policy"], masked_logprobs_R=leaves["masked"]), row, settings)
    assert total.item() == pytest.approx(_written_again(values, tree, step, guard), rel=1e-12, abs=1e-12)
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    for name, gradient in zip(leaves, gradients):
        if name == "masked" and config.perception.masked_branch == "frozen":
            assert gradient is None
            continue
        found = [0.0] * len(RESPONSE) if gradient is None else gradient.tolist()
        for t in range(len(RESPONSE)):
            assert found[t] == pytest.approx(_slope(values, name, t, tree, step, guard), rel=1e-6, abs=1e-8)


def _slope(values: dict[str, list[float]], name: str, t: int, *arguments: Any) -> float:
    """By a central difference; old log-probs stay, also where the policy is still the old one."""
    sides = []
    for step in (1e-6, -1e-6):
        moved = [value + step * (place == t) for place, value in enumerate(values[name])]
        sides.append(_written_again(values | {name: moved}, *arguments))
    return (sides[0] - sides[1]) / 2e-6
