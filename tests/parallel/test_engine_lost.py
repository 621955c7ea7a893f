"""A vLLM engine that dies in the middle of a step; and what its caches save within a group."""

from __future__ import annotations

import importlib.util
import io
from contextlib import redirect_stderr
from typing import Any

import pytest
import torch

from megatron_papo.config import Config
from tests.parallel.generation_cases import make_sampling, tokens
from tests.support.inputs import FOR_VLLM
from tests.support.ranks import run_ranks
from tests.support.tiny_run import tiny_run

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

ENGINE = {"generation__engine": "vllm", "generation__kv_cache_gib": 0.05}
MODEL = FOR_VLLM


def _model_of(generator: Any) -> torch.nn.Module:
    return generator.llm.llm_engine.model_executor.driver_worker.worker.model_runner.model


def _dies(generator: Any, after_passes: int) -> None:
    """From now on the engine's model fails in its forward pass number `after_passes`."""
    left = [after_passes]

    def count(*_: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise MemoryError("planted")

    _model_of(generator).language_model.model.layers[0].register_forward_pre_hook(count)


def _lost_and_restarted(config: Config) -> dict[str, Any]:
    from megatron_papo.data.dataset import PromptDataset
    from megatron_papo.generation import EngineLost, build_generator
    from megatron_papo.training.rollouts import generate, hand_over
    from megatron_papo.training.session import open_run

    with open_run(config) as run:
        generator = build_generator(config, run.processor, run.layout)
        prompts = [PromptDataset(config.data, "train", run.processor).prompt(row) for row in range(3)]
        sampling = make_sampling(max_response_tokens=6)
        hand_over(run, generator, policy_version=7)
        undisturbed = generate(run, generator, prompts, sampling)
        first = generator.llm
        if run.layout.rank == 1:
            _dies(generator, after_passes=3)
        told = io.StringIO()
        with redirect_stderr(told):
            disturbed = generate(run, generator, prompts, sampling)
        found = {
            "told": [line for line in told.getvalue().splitlines() if "engine of rank" in line],
            "same": tokens(disturbed) == tokens(undisturbed),
            "versions": {rollout.policy_version for group in disturbed for rollout in group.rollouts},
            "anew": generator.llm is not first,
            "restarts": run.counts["engine_restarts"],
        }
        _dies(generator, after_passes=2)
        with pytest.raises(EngineLost) as caught:
            generate(run, generator, prompts, sampling)
        found["last"] = str(caught.value)
        generator.close()
    return found


def test_an_engine_that_dies_on_one_rank_is_started_again_with_the_same_rollouts(inputs, tmp_path):
    config = tiny_run(inputs, tmp_path / "run", parallel__tensor=2, generation__restarts=1, **ENGINE)
    lost = "the engine of rank 1 died: MemoryError: planted"
    for rank, found in enumerate(run_ranks(_lost_and_restarted, 2, config)):
        assert found == {
            "told": [f"papo: warning: {lost}; it is started again and asked the same"] if rank == 0 else [],
            "same": True,
            "versions": {7},
            "anew": True,
            "restarts": 1,
            "last": "the engine of rank 0 died: MemoryError: planted",  # the second time, of one allowed
        }


def _work_of_a_group(config: Config) -> dict[str, Any]:
    """With and without prefix caching: passes through the vision tower, and the share of prompt tokens not computed."""
    from megatron_papo.data.dataset import PromptDataset
    from megatron_papo.generation import build_generator
    from megatron_papo.training.rollouts import hand_over
    from megatron_papo.training.session import open_run

    with open_run(config) as run:
        generator = build_generator(config, run.processor, run.layout)
        hand_over(run, generator, policy_version=0)
        encoded: list[int] = []
        _model_of(generator).visual.register_forward_pre_hook(
            lambda _, args, kwargs: encoded.append(len(kwargs.get("grid_thw", args[1] if len(args) > 1 else ()))),
            with_kwargs=True,
        )
        prompts = [PromptDataset(config.data, "train", run.processor).prompt(row) for row in range(2)]
        groups = generator.generate(prompts, make_sampling(group_size=8, max_response_tokens=4))
        cached, read = generator.take_metrics()["engine/prefix_cached"]
        generator.close()
    return {
        "encoded": sum(encoded),
        "images": sum(prompt.num_images for prompt in prompts),
        "cached": cached / read,
        "length": [prompt.inputs.token_ids_S.numel() for prompt in prompts],
        "tokens": tokens(groups),
    }


def test_a_group_reads_its_prompt_once_and_encodes_its_images_once(inputs, tmp_path):
    long = ENGINE | {"data__instruction": "and so on " * 25, "data__max_prompt_tokens": 400}
    with_cache, without = (
        run_ranks(_work_of_a_group, 1, tiny_run(inputs, tmp_path / name, generation__prefix_caching=on, **long))[0]
        for name, on in (("cached", True), ("plain", False))
    )
    assert with_cache["tokens"] == without["tokens"]
    assert with_cache["encoded"] == without["encoded"] == with_cache["images"] == 2
    assert without["cached"] == 0
    # whole blocks alone are shared, of 128 tokens on a CPU: all but the first rollout of a group take them from there
    whole = [length // 128 * 128 for length in with_cache["length"]]
    assert with_cache["cached"] == pytest.approx(7 * sum(whole) / (8 * sum(with_cache["length"])))
