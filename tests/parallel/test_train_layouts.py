"""A whole training run gives the same numbers in every layout: rollouts, losses, KLs, gradient norms, step by step.

The single-rank run is the reference; that one equals Hugging Face by `test_model_parity` and the hand-computed losses
by `test_losses`. Rollouts are sampled anew in each run, so equal numbers say that hand-over and sampling agree too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megatron_papo.config import Config
from megatron_papo.data.order import DataCursor
from tests.support.layouts import layout
from tests.support.ranks import run_ranks
from tests.support.tiny_run import OVERRIDES, make_inputs, metrics, tiny_run

OBJECTIVES = {
    "frozen": {"loss__entropy_coef": 0.03},
    "joint": {
        "perception__masked_branch": "joint",
        "perception__kl": "full",
        "entropy__kind": "full",
        "loss__entropy_coef": 0.03,
        "loss__masked_entropy_coef": 0.03,
        "loss__averaging": "sequence",
        "train__dynamic_sampling__enabled": True,
        "train__dynamic_sampling__high": 1.0,
        "train__dynamic_sampling__prompts_per_round": 3,
        "train__dynamic_sampling__when_none_kept": "keep",
        "train__tokens_per_micro_batch": 400,
    },
}
LAYOUTS = {
    "TP2 SP": {"train__tokens_per_micro_batch": 300},
    "PP2, full recompute": {},
    "DP2": {"parallel__distributed_optimizer": True},
    "TP2 PP2": {"train__tokens_per_micro_batch": 1000},
}
"""What else differs from the run on one rank."""


RUNS = [
    *(pytest.param("qwen2_5_vl", "frozen", name, marks=pytest.mark.fast) for name in LAYOUTS),
    *(("qwen2_5_vl", "joint", name) for name in LAYOUTS),
    ("qwen3_vl", "frozen", "DP2"),
    ("qwen3_vl", "joint", "PP2, full recompute"),
]


def _train(config: Config) -> None:
    from megatron_papo.train import main

    main(config)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Callable[[str], Path]:
    """Of a family: five rows, so that the second step, which begins at the fifth, draws one of two pictures twice."""

    @cache
    def of(family: str) -> Path:
        folder = make_inputs(tmp_path_factory.mktemp("inputs"), family=family)
        rows = (folder / "rows.jsonl").read_text().splitlines(keepends=True)[:5]
        (folder / "rows.jsonl").write_text("".join(rows))
        return folder

    assert [next(DataCursor(5, OVERRIDES["run.seed"]).rows(position)) for position in range(4, 8)] == [3, 3, 2, 1]
    return of


@pytest.fixture(scope="module")
def single_rank(inputs, tmp_path_factory) -> Callable[[str, str], list[dict[str, Any]]]:
    """Of a family and an objective: what the run on one rank recorded."""

    @cache
    def of(family: str, objective: str) -> list[dict[str, Any]]:
        folder = tmp_path_factory.mktemp("single")
        run_ranks(_train, 1, tiny_run(inputs(family), folder, **OBJECTIVES[objective]))
        return metrics(folder)

    return of


@pytest.mark.parametrize(("family", "objective", "name"), RUNS)
def test_every_layout_trains_alike(family, objective, name, single_rank, inputs, tmp_path):
    expected = single_rank(family, objective)
    ranks = layout(name, **LAYOUTS[name])
    settings = {**OBJECTIVES[objective], **ranks.settings}
    run_ranks(_train, ranks.num_ranks, tiny_run(inputs(family), tmp_path, **settings))
    found = metrics(tmp_path)
    assert len(found) == len(expected) == 2
    assert expected[0]["optim/grad_norm"] > 1e-3 and expected[0]["perception_kl"] > 0
    for want, got in zip(expected, found, strict=True):
        assert got.keys() == want.keys()
        wrong = {name: (want[name], got[name]) for name in want if not _close(want[name], got[name])}
        assert not wrong, f"step {want['step']}"


def _close(want: float, got: float) -> bool:
    return math.isclose(want, got, rel_tol=2e-4, abs_tol=2e-5)
