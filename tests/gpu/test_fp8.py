"""FP8 in Transformer Engine: log-probs near bf16's by every recipe that the card has, and the padding that products of
FP8 need is seen by nobody. Skipped without a GPU."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from megatron_papo.config import Fp8Config
from tests.support.ranks import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs a GPU with FP8"
    ),
    pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is None, reason="needs Transformer Engine"),
]
HOPPER = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9, reason="needs Hopper"
)
PADDING = 0.01
"""Nats a token, mean: rows of another length may take other kernels, which round elsewhere; the values are the same."""


def _logprobs(recipe: str, fixed_rows: bool = False) -> dict:
    """Of the benchmarks' small model, weights drawn by name: the same in every process. `fixed_rows`: rows padded to
    the whole budget."""
    from benchmarks.gpu.folder import model_folder
    from benchmarks.gpu.fp8 import RECIPES
    from benchmarks.gpu.policy import open_ours
    from benchmarks.rollouts import Workload, make_groups

    work = Workload(101, 13, num_prompts=2, group_size=3)  # rows of 140 tokens a group: no multiple of 16
    settings = RECIPES.get(recipe, {}) | {"model__dtype": "bfloat16", "fp8__recipe": recipe}
    settings["train__fixed_rows"] = fixed_rows
    with model_folder("tiny") as folder, open_ours(folder, work, **settings) as ours:
        groups = make_groups(work, ours.run.processor)
        ours.update("PAPO frozen", groups)  # scales of `delayed` follow it; it moves no weight by more than 1e-6
        return {key: value.cpu() for key, value in ours.logprobs(groups).items()}


def _gap(own: dict, other: dict) -> float:
    return float(torch.cat([(own[key] - other[key]).abs() for key in own]).mean())


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", pytest.param("blockwise", marks=HOPPER)])
def test_logprobs_are_within_the_limit_and_padding_is_invisible(recipe):
    (plain,), (found,) = run_ranks(_logprobs, 1, "off"), run_ranks(_logprobs, 1, recipe)
    assert 0 < _gap(found, plain) < Fp8Config().gap_limit
    (longer,) = run_ranks(_logprobs, 1, recipe, True)
    assert _gap(found, longer) < PADDING
