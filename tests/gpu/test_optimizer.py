"""Moments in bf16, and states on the host: a run that is saved and resumed goes on bit for bit. Skipped without a GPU.

Torch's deterministic kernels are asked for, so that two runs of the same steps are the same numbers; the tolerance is
then zero. Nothing is compiled: in every one of a test's runs that took longer than its steps (H100: 40 s and more).
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil

import pytest
import torch

from megatron_papo.config import Config
from tests.support.ranks import run_ranks
from tests.support.tiny_run import make_inputs, metrics, tiny_run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
NEEDS_TE = pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is None, reason="needs Transformer Engine")

SETTINGS = {
    "moments in bf16": {"optim__precision_aware": True},
    "all on the host": {"optim__offload_fraction": 1.0},
    "half on the host": {"optim__offload_fraction": 0.5},
}
SHARED = {
    "model__dtype": "bfloat16",
    "parallel__distributed_optimizer": True,
    "train__updates_per_step": 1,
    "checkpoint__save_every": 1,
    "checkpoint__keep_last": 9,
}
FIRST_STEPS, ALL_STEPS = 3, 5


def _train(config: Config) -> None:
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS has no other switch
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.compiler.set_stance("force_eager")
    from megatron_papo.train import main

    main(config)


@pytest.mark.parametrize("name", [pytest.param(name, marks=NEEDS_TE if "bf16" in name else ()) for name in SETTINGS])
def test_a_run_resumed_after_three_updates_is_the_undisturbed_one(tmp_path, name):
    inputs, settings = make_inputs(tmp_path / "inputs"), SHARED | SETTINGS[name]
    run_ranks(_train, 1, tiny_run(inputs, tmp_path / "whole", train__steps=ALL_STEPS, **settings))
    run_ranks(_train, 1, tiny_run(inputs, tmp_path / "cut", train__steps=FIRST_STEPS, **settings))
    shutil.copytree(tmp_path / "cut", tmp_path / "before")
    run_ranks(_train, 1, tiny_run(inputs, tmp_path / "cut", train__steps=ALL_STEPS, **settings))
    whole, cut = metrics(tmp_path / "whole"), metrics(tmp_path / "cut")
    assert len(metrics(tmp_path / "before")) == FIRST_STEPS and len(whole) == len(cut) == ALL_STEPS
    assert all(math.isfinite(step["loss/total"]) and step["optim/grad_norm"] > 0 for step in whole)
    assert whole[1]["ref_kl"] > 0, "the updates moved the weights"
    assert cut == whole
