"""The guard of FP8: when it measures, when it leaves FP8 for good, and what a checkpoint keeps of it."""

from __future__ import annotations

import json
import math

import pytest
import torch

from megatron_papo.config import Fp8Config
from megatron_papo.model.fp8.counters import Counters, count_inputs
from megatron_papo.training.precision_guard import GapSums, PrecisionGuard

CONFIG = Fp8Config(recipe="tensorwise", gap_every=3, gap_limit=0.05)


def test_it_measures_at_the_first_step_of_a_process_and_every_so_often():
    guard = PrecisionGuard.of(CONFIG)
    due = []
    for step in range(4, 11):
        due.append(guard.is_due(step))
        if due[-1]:
            guard, _ = guard.observe(0.01)
    assert due == [True, False, True, False, False, True, False]  # steps 4, 6 and 9
    first_alone = PrecisionGuard.of(CONFIG.model_copy(update={"gap_every": 0}))
    assert first_alone.is_due(7) and not first_alone.observe(0.0)[0].is_due(9)


@pytest.mark.parametrize("gap", [0.0501, math.inf, math.nan])
def test_beyond_the_limit_it_is_off_for_good(gap):
    guard, reason = PrecisionGuard.of(CONFIG).observe(gap)
    assert not guard.on and not guard.is_due(0) and not guard.is_due(3)
    assert "> fp8.gap_limit=0.05" in reason
    kept = json.loads(json.dumps(guard.state()))
    assert not PrecisionGuard.from_state(CONFIG, kept).on


def test_within_the_limit_it_stays_on():
    guard, reason = PrecisionGuard.of(CONFIG).observe(0.05)
    assert guard.on and reason == ""
    resumed = PrecisionGuard.from_state(CONFIG, guard.state())
    assert resumed.on and resumed.is_due(1)  # another process: measured anew
    assert PrecisionGuard.from_state(CONFIG, None).on  # of a checkpoint from before there was a guard
    assert not PrecisionGuard.from_state(Fp8Config(), guard.state()).on  # settings that say off


@pytest.mark.parametrize("settings", [{}, {"recipe": "mxfp8", "score": False, "update": False}])
def test_without_fp8_it_measures_nothing(settings):
    guard = PrecisionGuard.of(Fp8Config(**settings))
    assert not guard.on and not guard.is_due(0)


def test_means_and_shares():
    sums = GapSums(gap=3.0, gap_max=2.0, num_tokens=6, amax_max=9.0, num_values=100, num_saturated=1, num_flushed=5)
    assert sums.metrics() == {
        "fp8/gap_mean": (0.5, 1.0),
        "fp8/gap_max": (2.0, 1.0),
        "fp8/amax_max": (9.0, 1.0),
        "fp8/saturated": (1, 100),
        "fp8/flushed": (5, 100),
    }
    assert GapSums().gap_mean == 0.0


@pytest.mark.parametrize("broken", range(3))
def test_a_nan_among_a_layers_inputs_is_counted_whichever_pass_has_it(broken):
    counters = Counters()
    for number in range(3):
        values = torch.full((4, 8), float(number + 1))
        values[number, 2] = math.nan if number == broken else 1.0
        count_inputs(torch.nn.Linear(8, 8), (values,), counters=counters, recipe="tensorwise", places=(None, None))
    assert math.isnan(counters.amax)
