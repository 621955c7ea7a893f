"""A whole training run gives the same numbers in every layout: rollouts, losses, KLs, gradient norms, step by step.

The single-rank run is the reference; that one equals Hugging Face by `test_model_parity` and the hand-computed losses
by `test_losses`. Rollouts are sampled anew in each run, so equal numbers say that hand-over and sampling agree too.
"""

from __future__ import annotations

import math
from pathlib import Path

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


def _train(config: Config) -> None:
    from megatron_papo.train import main

    main(config)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """Five rows, so that the second step, which begins at the fifth, draws one of two pictures twice."""
    folder = make_inputs(tmp_path_factory.mktemp("inputs"))
    rows = (folder / "rows.jsonl").read_text().splitlines(keepends=True)[:5]
    (folder / "rows.jsonl").write_text("".join(rows))
    assert [next(DataCursor(5, OVERRIDES["run.seed"]).rows(position)) for position in range(4, 8)] == [3, 3, 2, 1]
    return folder


@pytest.fixture(scope="module", params=[pytest.param("frozen", marks=pytest.mark.fast), "joint"])
def single_rank(request, inputs, tmp_path_factory):
    objective = OBJECTIVES[request.param]
    folder = tmp_path_factory.mktemp("single")
    run_ranks(_train, 1, tiny_run(inputs, folder, **objective))
    return objective, metrics(folder)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_trains_alike(name, single_rank, inputs, tmp_path):
    objective, expected = single_rank
    ranks = layout(name, **LAYOUTS[name])
    run_ranks(_train, ranks.num_ranks, tiny_run(inputs, tmp_path, **{**objective, **ranks.settings}))
    found = metrics(tmp_path)
    assert len(found) == len(expected) == 2
    assert expected[0]["optim/grad_norm"] > 1e-3 and expected[0]["perception_kl"] > 0
    for want, got in zip(expected, found, strict=True):
        assert got.keys() == want.keys()
        wrong = {name: (want[name], got[name]) for name in want if not _close(want[name], got[name])}
        assert not wrong, f"step {want['step']}"


def _close(want: float, got: float) -> bool:
    return math.isclose(want, got, rel_tol=2e-4, abs_tol=2e-5)
