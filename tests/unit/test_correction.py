"""Importance weights between engine and trainer: by hand, their gradient, and that no split of a batch changes them."""

from __future__ import annotations

from dataclasses import replace
from math import exp, log

import pytest
import torch

from megatron_papo.algorithm.importance_weights import correction_weights
from megatron_papo.algorithm.loss_settings import LossSettings
from megatron_papo.algorithm.losses import papo_loss
from megatron_papo.config import ConfigError, LossConfig, load_config
from megatron_papo.types import HeadOutputs
from tests.unit.test_losses import F64, _config, _means, _parts, _row

TRAINER = F64([-1.0 + log(4), -1.0 + log(1.5), -1.0 - log(4), -1.0])
"""Against engine log-probs of -1: ratios 4, 1.5, 0.25, 1; geometric means 1.5 ** (1/3) and 1."""


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"correction": "truncated"}, [2.0, 1.5, 0.25, 1.0]),
        ({"correction": "masked"}, [0.0, 1.5, 0.0, 1.0]),
        ({"correction": "masked", "correction_cap": 5.0, "correction_floor": 0.2}, [4.0, 1.5, 0.25, 1.0]),
        ({"correction": "truncated", "correction_level": "sequence"}, [1.5 ** (1 / 3)] * 3 + [1.0]),
        ({"correction": "masked", "correction_level": "sequence", "correction_cap": 1.1}, [0.0] * 3 + [1.0]),
    ],
)
def test_weights_by_hand(settings, expected):
    weights = correction_weights(TRAINER, _row(), LossConfig(**settings))
    assert weights.tolist() == pytest.approx(expected)


def test_no_correction_is_no_weight():
    assert correction_weights(TRAINER, _row(), LossConfig()) is None


def test_tokens_that_no_loss_reads_are_no_part_of_a_sequence():
    row = _row(loss_mask_R=torch.tensor([False, True, True, True]))
    weights = correction_weights(TRAINER, row, LossConfig(correction="truncated", correction_level="sequence"))
    assert weights[0].item() == pytest.approx((1.5 / 4) ** 0.5)


def test_the_policy_term_is_weighted_and_nothing_else():
    row = _row(old_logprobs_R=TRAINER, ref_logprobs_R=F64([-1.2] * 4), masked_logprobs_R=F64([-1.5] * 4))
    coefs = {"perception_coef": 0.02, "reference_coef": 0.01}
    seen = HeadOutputs(policy_logprobs_R=TRAINER.clone())  # ratios to old of 1: the term is -A
    _, plain = papo_loss(seen, row, LossSettings.at_step(_config(coefs), 0))
    _, weighted = papo_loss(seen, row, LossSettings.at_step(_config(coefs | {"correction": "truncated"}), 0))
    assert _parts(plain)["policy"] == pytest.approx((-1 - 1 - 1 + 1) / 8)
    assert _parts(weighted)["policy"] == pytest.approx((-2.0 - 1.5 - 0.25 + 1.0) / 8)
    for name in ("reference", "perception"):
        assert _parts(weighted)[name] == _parts(plain)[name] != 0
    means = _means(weighted)
    assert means["correction"] == pytest.approx((2 + 1.5 + 0.25 + 1) / 4) and means["correction_cut"] == 0.25
    assert means["rollout_gap"] == pytest.approx((2 * log(4) + log(1.5)) / 4)
    assert means["rollout_gap_max"] == pytest.approx(log(4))
    k3 = sum(exp(gap) - 1 - gap for gap in (log(4), log(1.5), -log(4)))
    assert means["rollout_kl"] == pytest.approx(k3 / 4)


def test_the_gradient_is_the_weighted_one_and_stops_at_the_weights():
    """On-policy (no old log-probs): d loss / d log-prob = -A weight share, and nothing through the weight itself."""
    policy = TRAINER.clone().requires_grad_()
    settings = LossSettings.at_step(_config({"correction": "truncated"}), 0)
    total, _ = papo_loss(HeadOutputs(policy_logprobs_R=policy), _row(), settings)
    total.backward()
    assert policy.grad.tolist() == pytest.approx([-2.0 / 8, -1.5 / 8, -0.25 / 8, 1.0 / 8])


def test_the_ratio_is_against_the_engine_when_asked():
    settings = LossSettings.at_step(_config({"old_logprobs": "rollout", "clip_high": 5.0, "clip_low": 0.9}), 0)
    _, metrics = papo_loss(HeadOutputs(policy_logprobs_R=TRAINER), _row(), settings)
    assert _parts(metrics)["policy"] == pytest.approx((-4 - 1.5 - 0.25 + 1.0) / 8)
    assert _means(metrics)["ratio"] == pytest.approx((4 + 1.5 + 0.25 + 1) / 4)
    assert _means(metrics)["rollout_gap_max"] == pytest.approx(log(4)), "the policy is still the one that generated"


def test_the_engine_is_compared_with_the_policy_that_generated_and_no_later_one():
    """In later updates only recomputed log-probs are of that policy: the policy's own would add its drift."""
    compared = {"rollout_gap", "rollout_gap_max", "rollout_kl"}
    against_engine = LossSettings.at_step(_config({"old_logprobs": "rollout"}), 0)
    recomputed = LossSettings.at_step(_config(), 0)
    drifted = HeadOutputs(policy_logprobs_R=TRAINER - 3.0)
    _, first = papo_loss(drifted, _row(), against_engine)
    _, later = papo_loss(drifted, _row(), replace(against_engine, first_update=False))
    _, scored = papo_loss(drifted, _row(old_logprobs_R=TRAINER), replace(recomputed, first_update=False))
    assert compared <= first.keys() and not compared & later.keys() and first.keys() - later.keys() == compared
    assert _means(scored)["rollout_gap"] == pytest.approx((2 * log(4) + log(1.5)) / 4)
    assert later["ratio"] == first["ratio"]


def test_a_split_between_responses_changes_no_weight():
    loss = LossConfig(correction="truncated", correction_level="sequence")
    row = _row()
    whole = correction_weights(TRAINER, row, loss)
    first = replace(
        row, rollout_index_R=row.rollout_index_R[:3], loss_mask_R=row.loss_mask_R[:3],
        rollout_logprobs_R=row.rollout_logprobs_R[:3],
    )  # fmt: skip
    assert correction_weights(TRAINER[:3], first, loss).tolist() == whole[:3].tolist()


def test_a_correction_of_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"^loss.correction needs loss.old_logprobs=recomputed"):
        load_config(None, ["loss.correction=masked", "loss.old_logprobs=rollout"])
