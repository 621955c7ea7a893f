"""vLLM's sleep beside a trainer: the memory comes back, and a prompt's log-probs after waking are those before; also of
an engine that forgets its weights as it sleeps, and of one that was started again out of its sleep.
Skipped without a GPU or vLLM. Not run on a GPU yet."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parallel.generation_cases import make_config, make_folder, make_prompts, make_sampling, named_tensors
from tests.support.ranks import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
CLOSE = 1e-5
"""Nats: the same kernels on the same weights; only a sum in another order could differ."""


def _asked_four_times(folder: Path, keep: bool) -> dict[str, Any]:
    """Greedy answers before a sleep, after one, after another hand-over of the same weights, and of an engine started
    again; an engine that does not `keep` its weights gets them before each."""
    from transformers import AutoConfig

    from megatron_papo.config import ParallelConfig
    from megatron_papo.distributed.layout import initialize
    from megatron_papo.generation.vllm.vllm_engine import VllmGenerator
    from tests.support.tiny import tiny_model

    layout = initialize(ParallelConfig())
    config = make_config(folder, engine="vllm", dtype="bfloat16", kv_cache_gib=1.0, keep_weights_asleep=keep)
    processor, prompts = make_prompts(config)
    model = tiny_model(AutoConfig.from_pretrained(folder), seed=11, std=0.12).cuda()
    engine, sampling = VllmGenerator(config, processor, layout), make_sampling(temperature=0.0, group_size=1)
    freed_bytes = engine.sleeper.freed_bytes  # it starts asleep
    answers, buffers = [], []
    for again, hand_over in enumerate((True, False, True, True)):
        if again == 3:
            engine.restart()
        if hand_over or not keep:
            engine.load_weights(iter(named_tensors(model)), 0)
            buffers.append(engine.llm.apply_model(partial(_made_at_loading, zeros=engine.in_vllm.ZEROS))[0])
        groups = engine.generate(prompts, sampling)  # wakes what sleeps, and sleeps again
        answers.append([(r.response_ids, r.rollout_logprobs) for group in groups for r in group.rollouts])
    engine.close()
    return {"answers": answers, "freed_gib": freed_bytes / 2**30, "buffers": buffers}


def _made_at_loading(model: torch.nn.Module, zeros: Sequence[str]) -> dict[str, torch.Tensor]:
    """The buffers, and what has to be zero."""
    loose = {f"{name} {place}": each for name in zeros for place, each in enumerate(getattr(model, name))}
    return {name: each.cpu() for name, each in (*model.named_buffers(), *loose.items())}


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_answers_after_a_sleep_are_those_before(family, tmp_path):
    folder = make_folder(tmp_path / "model", family=family)
    kept, forgot = (run_ranks(_asked_four_times, 1, folder, keep, vllm=True)[0] for keep in (True, False))
    assert kept["freed_gib"] > 0.9 and forgot["freed_gib"] > 0.9, "the cache of 1 GiB came back"
    first, *later = kept["answers"] + forgot["answers"]
    for answers in later:
        assert [ids for ids, _ in answers] == [ids for ids, _ in first]
        for (_, own), (_, before) in zip(answers, first, strict=True):
            assert own == pytest.approx(before, abs=CLOSE)
    before, *after = kept["buffers"] + forgot["buffers"]
    for buffers in after:
        assert buffers.keys() == before.keys() and any("cos_sin_cache" in name for name in buffers)
        assert all(torch.equal(buffers[name], before[name]) for name in before)
