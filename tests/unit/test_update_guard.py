"""Which updates are skipped, as a table of gradient norms."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from megatron_papo.algorithm.loss_settings import LossSettings
from megatron_papo.algorithm.losses import papo_loss
from megatron_papo.config import OptimConfig
from megatron_papo.optimization.gradient_guard import UpdateGuard, fault_of
from megatron_papo.types import HeadOutputs
from tests.unit.test_losses import F64, _config, _row

STEADY = [1.0, 1.2, 0.8, 1.1, 0.9, 1.0, 1.0, 1.0]


def _skips(guard: UpdateGuard, norms: list[float]) -> list[bool]:
    return [guard.skips(norm) for norm in norms]


def test_what_is_not_finite_is_skipped_whatever_the_settings():
    guard = UpdateGuard(OptimConfig())
    assert _skips(guard, [1.0, math.nan, math.inf, 1e9, 1.0]) == [False, True, True, False, False]


def test_a_spike_is_one_beyond_the_factor_times_the_median_and_does_not_raise_it():
    guard = UpdateGuard(OptimConfig(spike_factor=5.0))
    assert _skips(guard, [*STEADY[:7], 100.0]) == [False] * 8, "seven norms are too few to call the eighth a spike"
    guard = UpdateGuard(OptimConfig(spike_factor=5.0))
    assert _skips(guard, [*STEADY, 4.9, 5.1, 5.1, 4.9]) == [False] * 9 + [True, True, False]


def test_too_many_in_a_row_are_a_reason_to_stop_and_one_between_is_not():
    guard = UpdateGuard(OptimConfig(max_skipped=2))
    _skips(guard, [1.0, math.nan, 1.0, math.nan])
    assert guard.reason_to_stop == ""
    guard.skips(math.inf)
    assert guard.reason_to_stop == "optim.max_skipped: 2 updates in a row were skipped; the gradient norm is inf"


def test_state_goes_on_where_it_was():
    guard, resumed = (UpdateGuard(OptimConfig(spike_factor=5.0, max_skipped=2)) for _ in range(2))
    _skips(guard, [*STEADY, 6.0])
    resumed.load(guard.state())
    assert resumed.skips(5.1) and "the median before it 1" in resumed.reason_to_stop


def _with(value: float, place: int = 1) -> object:
    values = [-1.0] * 4
    values[place] = value
    return F64(values)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("loss", [{}, {"correction": "truncated"}, {"old_logprobs": "rollout"}])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_an_engines_broken_log_prob_is_a_fault_whoever_reads_it(value, loss, advantage):
    """Its gradient may be finite: clipping chooses the other branch."""
    policy = F64([-1.0] * 4).requires_grad_()
    row = _row(rollout_logprobs_R=_with(value), advantages_R=F64([advantage] * 4))
    total, metrics = papo_loss(HeadOutputs(policy), row, LossSettings.at_step(_config(loss), 0))
    total.backward()
    fault = fault_of(metrics)
    assert "the engine's" in fault and fault.endswith(" are not finite")
    guard = UpdateGuard(OptimConfig(max_skipped=1))
    assert guard.skips(1.0, fault) and guard.reason_to_stop.endswith(f"were skipped; {fault}")
    assert guard.take_skipped() == [fault] and guard.take_skipped() == []


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"policy_logprobs_R": math.nan}, "the policy's log-probs"),
        ({"old_logprobs_R": math.nan}, "the old policy's log-probs (with loss.old_logprobs=rollout the engine's)"),
        ({"rollout_logprobs_R": math.nan}, "the engine's log-probs"),
        ({"ref_logprobs_R": math.nan}, "the reference's log-probs"),
        ({"masked_logprobs_R": math.nan}, "the log-probs under the masked image"),
        ({}, ""),
    ],
)
def test_a_fault_is_named_by_its_source(changes, what):
    coefs = {"reference_coef": 0.1, "perception_coef": 0.1}
    row = _row(old_logprobs_R=F64([-1.0] * 4), ref_logprobs_R=F64([-1.2] * 4), masked_logprobs_R=F64([-2.0] * 4))
    row = replace(row, **{name: _with(value) for name, value in changes.items() if name != "policy_logprobs_R"})
    outputs = HeadOutputs(_with(changes.get("policy_logprobs_R", -1.0)))
    _, metrics = papo_loss(outputs, row, LossSettings.at_step(_config(coefs), 0))
    assert fault_of(metrics) == (f"{what} are not finite" if what else "")


def test_a_loss_alone_and_a_supervised_update_are_looked_at_too():
    assert fault_of({"loss/total": (math.inf, 1.0), "policy_logprobs": (-3.0, 4.0)}) == "the loss is not finite"
    assert fault_of({"loss/total": (1.0, 1.0), "policy_logprobs": (-3.0, 4.0), "entropy": (math.nan, 1.0)}) == ""
