"""Which updates are skipped, as a table of gradient norms."""

from __future__ import annotations

import math

from megatron_papo.config import OptimConfig
from megatron_papo.update_guard import UpdateGuard

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
