"""The rate of every update of short runs, as Megatron's scheduler sets it, against a calculation by hand."""

from __future__ import annotations

from math import cos, pi

import pytest
import torch

from megatron_papo.config import OptimConfig
from megatron_papo.optimization.optimizer import build_schedule


def _rates(num_updates: int, resumed_at: int = 0, **optim: object) -> list[float]:
    """Of every update from `resumed_at` on, in a run that stopped there."""
    settings = OptimConfig(lr=1.0, **optim)
    adam, schedule = _fresh(settings, num_updates)
    for _ in range(resumed_at):
        schedule.step(increment=1)
    if resumed_at:
        kept = schedule.num_steps
        adam, schedule = _fresh(settings, num_updates)
        schedule.num_steps = kept  # as a checkpoint sets it
        schedule.step(increment=0)
    rates = []
    for _ in range(num_updates - resumed_at):
        rates.append(adam.param_groups[0]["lr"])
        schedule.step(increment=1)
    return rates


def _fresh(settings: OptimConfig, num_updates: int):
    adam = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=settings.lr)
    return adam, build_schedule(adam, settings, num_updates)  # of the optimizer it reads the groups alone


@pytest.mark.parametrize(
    ("num_updates", "optim", "expected"),
    [
        (3, {}, [1, 1, 1]),
        (4, {"warmup_steps": 2}, [1 / 2, 1, 1, 1]),
        (4, {"schedule": "linear"}, [1, 3 / 4, 2 / 4, 1 / 4]),
        (4, {"schedule": "linear", "warmup_steps": 1}, [1, 3 / 4, 2 / 4, 1 / 4]),
        (4, {"schedule": "linear", "warmup_steps": 2}, [1 / 2, 1, 2 / 3, 1 / 3]),
        (4, {"schedule": "linear", "warmup_steps": 3}, [1 / 3, 2 / 3, 1, 1 / 2]),
        (4, {"schedule": "linear", "warmup_steps": 4}, [1 / 4, 2 / 4, 3 / 4, 1]),
        (2, {"schedule": "linear", "warmup_steps": 5}, [1 / 5, 2 / 5]),  # the run ends while it warms up
        (1, {"schedule": "cosine", "warmup_steps": 1}, [1]),
        (1, {"schedule": "cosine"}, [1]),
        (2, {"schedule": "cosine"}, [1, 1 / 2]),
        (4, {"schedule": "cosine", "warmup_steps": 2}, [1 / 2, 1, (1 + cos(pi / 3)) / 2, (1 + cos(2 * pi / 3)) / 2]),
        (4, {"schedule": "linear", "warmup_steps": 2, "min_lr_fraction": 0.4}, [1 / 2, 1, 0.8, 0.6]),
    ],
)
def test_every_update_has_a_rate_and_it_is_the_documented_one(num_updates, optim, expected):
    assert _rates(num_updates, **optim) == pytest.approx(expected)
    for update in range(1, num_updates):
        assert _rates(num_updates, update, **optim) == pytest.approx(expected[update:]), f"resumed after {update}"


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warm_up", range(7))
@pytest.mark.parametrize("num_updates", range(1, 7))
def test_no_update_of_a_run_stands_still_and_none_is_at_the_end_of_the_decay(schedule, warm_up, num_updates):
    rates = _rates(num_updates, schedule=schedule, warmup_steps=warm_up)
    assert all(0 < rate <= 1 for rate in rates)
    peak = max(warm_up, 1)
    for update in range(peak + 1, num_updates + 1):
        walked = (update - peak) / (num_updates + 1 - peak)
        left = {"constant": 1, "linear": 1 - walked, "cosine": (1 + cos(pi * walked)) / 2}[schedule]
        assert rates[update - 1] == pytest.approx(left)
