"""The user's own metrics: what the functions are given and may return, and what a failure costs."""

from __future__ import annotations

import pytest
import torch

from megatron_papo.algorithm.advantages import with_advantages
from megatron_papo.rewards import MetricRow
from megatron_papo.rewards.reward_row import metric_rows_of
from megatron_papo.training.own_metrics import own_metrics
from megatron_papo.types import Group, ModelInputs, Prompt, Rollout


def _rows() -> list[MetricRow]:
    prompt = Prompt(
        "train:0", 0, "how many?", "3", (), ModelInputs(torch.tensor([1]), None, None), columns={"level": 2}
    )
    rollouts = tuple(Rollout(index, (7,) * (index + 1), (), text, "stop", 0) for index, text in enumerate("ab"))
    group = with_advantages(Group(prompt, rollouts, (1.0, 0.0), {"accuracy": (1.0, 0.0)}))
    return metric_rows_of(group, "<think>", 4)


def shares(rows: list[MetricRow]) -> dict[str, object]:
    return {"think": sum("<think>" in row.response for row in rows) / len(rows), "tokens": torch.tensor(1.5)}


def of_some(rows: list[MetricRow]) -> dict[str, object]:
    right = [row for row in rows if row.reward_parts["accuracy"]]
    return {"right_tokens": (sum(row.num_tokens for row in right), len(right))}


def test_a_metric_is_a_mean_over_the_rows_or_a_sum_with_its_count():
    rows = _rows()
    assert (rows[0].reward, rows[0].advantage > 0, rows[1].step, rows[0].columns) == (1.0, True, 4, {"level": 2})
    metrics, faults = own_metrics([shares, of_some], rows)
    assert not faults
    assert metrics == {
        "own/think": (2.0, 2.0), "own/tokens": (3.0, 2.0), "own/right_tokens": (1.0, 1.0), "own/failed": (0.0, 2.0),
    }  # fmt: skip
    assert own_metrics([shares], []) == ({}, {}), "a rank without responses calls nothing"


def broken(rows: list[MetricRow]) -> dict[str, object]:
    return {"a": 1.0, "b": 1 / 0}


@pytest.mark.parametrize(
    "returned, reason",
    [
        ({"think": 1.0}, "another function has already returned think"),
        ({"a b": 1.0}, "'a b' is no name for a metric"),
        ({"failed": 1.0}, "'failed' is no name for a metric"),
        ({"x": float("nan")}, "the metric x is nan"),
        ({"x": (1.0,)}, "IndexError"),
        (3.0, "'float' object has no attribute 'items'"),
    ],
)
def test_a_function_that_fails_costs_its_own_metrics_alone(returned, reason):
    def returns(rows: list[MetricRow]) -> object:
        return returned

    metrics, faults = own_metrics([shares, broken, returns], _rows())
    assert set(metrics) == {"own/think", "own/tokens", "own/failed"} and metrics["own/failed"] == (2.0, 3.0)
    zero, wrong = faults.values()
    assert zero.startswith("failed: ZeroDivisionError: division by zero (test_own_metrics.py:") and reason in wrong
