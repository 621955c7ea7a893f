"""The guard against collapse: which signs count, when it acts, and what a checkpoint keeps of it."""

from __future__ import annotations

import json
from math import exp, nan
from types import SimpleNamespace

import pytest

from megatron_papo.algorithm.collapse_guard import CollapseGuard
from megatron_papo.algorithm.loss_settings import LossSettings
from megatron_papo.algorithm.losses import papo_loss
from megatron_papo.config import GuardConfig
from megatron_papo.train import watch_for_collapse
from megatron_papo.types import HeadOutputs
from tests.unit.test_losses import F64, _config, _row

CALM = {"perception_kl": 0.05, "clip_fraction": 0.0005, "masked_entropy": 0.4}


@pytest.mark.parametrize("sign", [{"perception_kl": 1.01}, {"clip_fraction": 0.008}, {"masked_entropy": nan}])
def test_guard_lowers_after_patience_and_begins_anew(sign: dict):
    guard = CollapseGuard(GuardConfig(action="lower", patience=2, factor=0.5))
    actions, factors = [], []
    for signs in (CALM, sign, CALM, sign, sign, sign, sign):
        guard, decision = guard.observe(**(CALM | signs))
        actions.append(decision.action)
        factors.append(guard.factor)
    assert actions == ["none", "none", "none", "none", "lower", "none", "lower"]
    assert factors == [1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.25]
    assert next(iter(sign)) in decision.reason and "2 steps in a row" in decision.reason


def test_guard_stops_with_its_reason():
    guard = CollapseGuard(GuardConfig(action="stop", patience=1))
    guard, decision = guard.observe(perception_kl=2.5, clip_fraction=0.0, masked_entropy=1.2)
    assert decision.action == "stop"
    assert decision.reason == "perception_kl 2.5 > 1, masked_entropy 1.2 > 1.1, 1 steps in a row"


def test_guard_is_silent_without_values_at_the_limit_and_when_off():
    on, off = CollapseGuard(GuardConfig(action="stop", patience=1)), CollapseGuard(GuardConfig(patience=1))
    nothing, at_limit = dict.fromkeys(CALM), {"perception_kl": 1.0, "clip_fraction": 0.007, "masked_entropy": 1.1}
    for guard, signs in ((on, nothing), (on, at_limit), (off, {**CALM, "perception_kl": 9.0})):
        after, decision = guard.observe(**signs)
        assert after == guard and decision.action == "none" and decision.reason == ""


def test_guard_survives_a_checkpoint():
    config = GuardConfig(action="lower", patience=2)
    guard = CollapseGuard(config, factor=0.25)
    guard, _ = guard.observe(**(CALM | {"perception_kl": exp(1)}))
    restored = CollapseGuard.from_state(config, json.loads(json.dumps(guard.state())))
    assert restored == guard == CollapseGuard(config, strikes=1, factor=0.25)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_tokens_clipped_at_either_sign_of_the_advantage_are_a_sign(advantage):
    """From the loss's metrics to the run's reason to stop: of four tokens one is clipped."""
    policy = [-1.0 + advantage, -1.0, -1.0, -1.0]
    row = _row(advantages_R=F64([advantage] * 4), old_logprobs_R=F64([-1.0] * 4))
    _, metrics = papo_loss(HeadOutputs(F64(policy)), row, LossSettings.at_step(_config(), 0))
    watched = SimpleNamespace(guard=CollapseGuard(GuardConfig(action="stop", patience=1)))
    assert watch_for_collapse(watched, metrics).startswith("perception.guard: clip_fraction 0.25 > 0.007")
