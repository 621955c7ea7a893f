"""The bytes that `costs/memory.py` counts are those that Megatron-Core really holds, for a tiny model in every
layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_papo.config import Config, load_config
from megatron_papo.costs.memory import StageMemory, stage_memory
from megatron_papo.model.shape import ModelShape
from tests.support.ranks import run_ranks
from tests.support.tiny import make_tiny_folder

ODD = {"vision_intermediate": 42, "vocab": 275}
"""Widths that need padding."""


def _config(folder: Path, overrides: list[str]) -> Config:
    return load_config(None, [f"model.path={folder}", "model.random_init=true", *overrides])


def _held(folder: Path, overrides: list[str]) -> tuple[int, int, int, int]:
    """Pipeline stage; bytes of weights, of gradient buffers, of master copies and moments after an update."""
    from megatron_papo.checkpoint.optimizer_state import slots
    from megatron_papo.distributed.accelerator import adapt_megatron, seed_all
    from megatron_papo.distributed.layout import initialize, layout
    from megatron_papo.model.policy import build_policy
    from megatron_papo.optimization.optimizer import build_optimizer, wrap_policy
    from megatron_papo.weights.held import held_parameters

    config, shape = _config(folder, overrides), ModelShape.from_folder(folder)
    adapt_megatron()
    initialize(config.parallel)
    seed_all(0)
    policy = wrap_policy(build_policy(config, shape), config)
    optimizer = build_optimizer(policy, config, num_updates=1)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.main_grad.fill_(0.1)
    optimizer.step()
    states = 0
    for slot in slots(optimizer.megatron, held_parameters(policy, shape, config.parallel.tensor)):
        states += slot.main.nbytes * slot.has_master
        states += sum(slot.state[name].nbytes for name in ("exp_avg", "exp_avg_sq"))
    gradients = sum(parameter.main_grad.nbytes for parameter in policy.parameters() if parameter.requires_grad)
    return layout().pipeline_rank, sum(p.nbytes for p in policy.parameters()), gradients, states


SECOND = {"family": "qwen3_vl", "head_dim": 24, "deepstack": [0, 1]}


@pytest.mark.parametrize(
    ("num_ranks", "model", "overrides"),
    [
        (1, {}, ["model.dtype=float32"]),
        (2, {"tie": True}, ["model.dtype=bfloat16", "parallel.tensor=2", "parallel.sequence=true"]),
        (2, {"tie": True}, ["model.dtype=bfloat16", "parallel.pipeline=2", "model.freeze.vision=true"]),
        (4, {}, ["model.dtype=bfloat16", "parallel.tensor=2", "parallel.pipeline=2"]),
        (4, {}, ["model.dtype=bfloat16", "parallel.tensor=2", "parallel.distributed_optimizer=true"]),
        (2, SECOND, ["model.dtype=float32", "parallel.tensor=2", "model.freeze.vision=true"]),
        (4, {**SECOND, "tie": True}, ["model.dtype=bfloat16", "parallel.pipeline=2", "model.freeze.projector=true"]),
        (4, SECOND, ["model.dtype=bfloat16", "parallel.tensor=2", "parallel.distributed_optimizer=true"]),
    ],
)
def test_counted_bytes_are_held(tmp_path: Path, num_ranks: int, model: dict[str, Any], overrides: list[str]):
    folder = make_tiny_folder(tmp_path, **model, **ODD)
    config = _config(folder, overrides)
    stages = stage_memory(config, ModelShape.from_folder(folder), num_ranks)
    held = run_ranks(_held, num_ranks, folder, overrides)
    for stage, weights, gradients, _ in held:
        assert (weights, gradients) == (stages[stage].weights, stages[stage].gradients)
    for expected in stages:
        assert _states(held, expected) == pytest.approx(expected.optimizer, rel=1e-3)


def _states(held: list[tuple[int, int, int, int]], expected: StageMemory) -> float:
    """Mean over a stage's ranks: data ranks share Adam's states out by parameters in a row, not evenly to the byte."""
    found = [states for stage, _, _, states in held if stage == expected.stage]
    return sum(found) / len(found)
