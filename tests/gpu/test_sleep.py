"""vLLM's sleep beside a trainer: the memory comes back, and a prompt's log-probs after waking are those before.
Skipped without a GPU or vLLM."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parallel.generation_cases import make_config, make_folder, make_prompts, make_sampling, named_tensors
from tests.ranks import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
CLOSE = 1e-5
"""Nats: the same kernels on the same weights; only a sum in another order could differ."""


def _asked_three_times(folder: Path) -> dict[str, Any]:
    """Greedy answers before a sleep, after one, and after another hand-over of the same weights."""
    from transformers import Qwen2_5_VLConfig

    from megatron_papo.config import ParallelConfig
    from megatron_papo.generation.vllm_engine import VllmGenerator
    from megatron_papo.parallel import initialize
    from tests.tiny import tiny_model

    layout = initialize(ParallelConfig())
    config = make_config(folder, engine="vllm", dtype="bfloat16", kv_cache_gib=1.0)
    processor, prompts = make_prompts(config)
    model = tiny_model(Qwen2_5_VLConfig.from_pretrained(folder), seed=11, std=0.12).cuda()
    engine, sampling = VllmGenerator(config, processor, layout), make_sampling(temperature=0.0, group_size=1)
    freed_bytes = engine.sleeper.freed_bytes  # it starts asleep
    answers = []
    for hand_over in (True, False, True):
        if hand_over:
            engine.load_weights(named_tensors(model), 0)
        groups = engine.generate(prompts, sampling)  # wakes what sleeps, and sleeps again
        answers.append([(r.response_ids, r.rollout_logprobs) for group in groups for r in group.rollouts])
    engine.close()
    return {"answers": answers, "freed_gib": freed_bytes / 2**30}


def test_answers_after_a_sleep_are_those_before(tmp_path):
    (found,) = run_ranks(_asked_three_times, 1, make_folder(tmp_path / "model"))
    assert found["freed_gib"] > 0.9, "the cache of 1 GiB came back"
    first, *later = found["answers"]
    for answers in later:
        assert [ids for ids, _ in answers] == [ids for ids, _ in first]
        for (_, own), (_, before) in zip(answers, first, strict=True):
            assert own == pytest.approx(before, abs=CLOSE)
