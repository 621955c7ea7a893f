"""Each engine against the trainer: after weights change, the log-probs of sampling are those the trainer recomputes."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_papo.config import Config
from tests.parallel.generation_cases import TOLERANCE, make_sampling
from tests.support.inputs import FOR_VLLM
from tests.support.ranks import run_ranks
from tests.support.tiny_run import make_inputs, tiny_run
from tests.toy_family.folder import make_toy_folder

HAS_VLLM = importlib.util.find_spec("vllm") is not None
NEEDS_VLLM = pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed")
CASES = {
    "transformers, PP 2": ({"parallel__pipeline": 2}, {"tie": True}),
    "transformers, TP 2 SP": ({"parallel__tensor": 2, "parallel__sequence": True}, {}),
    "vllm, TP 2, engine TP 2": (
        {
            "parallel__tensor": 2,
            "generation__engine": "vllm",
            "generation__tensor": 2,
            "generation__kv_cache_gib": 0.05,
        },
        {"tie": True},
    ),
    "vllm, TP 2 PP 2, two engines TP 2": (
        {
            "parallel__tensor": 2,
            "parallel__pipeline": 2,
            "generation__engine": "vllm",
            "generation__tensor": 2,
            "generation__kv_cache_gib": 0.05,
            "generation__bucket_mib": 1,
        },
        {},
    ),
}

SECOND_FAMILY = {"transformers, PP 2", "transformers, TP 2 SP"}
"""Cases whose ranks the second family shares."""


@pytest.mark.parametrize("case", [pytest.param(name, marks=NEEDS_VLLM if "vllm" in name else ()) for name in CASES])
def test_sampling_and_training_agree_on_every_token(case, tmp_path):
    settings, model = CASES[case]
    folders = [make_inputs(tmp_path / "inputs", **FOR_VLLM, **model)]
    if case in SECOND_FAMILY:
        folders.append(make_inputs(tmp_path / "second", family="qwen3_vl", **FOR_VLLM, **model))
    if case == "transformers, TP 2 SP":
        folders.append(make_inputs(tmp_path / "toy", make_toy_folder))
    assert_agreement(folders, tmp_path / "run", settings)


@NEEDS_VLLM
@pytest.mark.slow
def test_an_engine_of_vllm_over_two_ranks_with_the_second_family(tmp_path):
    settings, model = CASES["vllm, TP 2, engine TP 2"]
    folder = make_inputs(tmp_path / "inputs", family="qwen3_vl", **FOR_VLLM, **model)
    assert_agreement([folder], tmp_path / "run", settings)


def assert_agreement(folders: list[Path], run_dir: Path, settings: dict) -> None:
    configs = [tiny_run(inputs, run_dir, **settings, generation__temperature=1.3) for inputs in folders]
    parallel = configs[0].parallel
    for rank in run_ranks(_largest_gaps, parallel.tensor * parallel.pipeline, *configs):
        for gap, num_tokens, change in rank:
            assert gap < TOLERANCE and num_tokens > 100
            assert change > 0.1  # the hand-over mattered


def _largest_gaps(*configs: Config) -> list[tuple[float, int, float]]:
    return [_largest_gap(config) for config in configs]


def _largest_gap(config: Config) -> tuple[float, int, float]:
    """Between engine and trainer after an update of every weight; tokens compared; how far the update moved them."""
    from megatron_papo.data.dataset import PromptDataset
    from megatron_papo.generation import build_generator
    from megatron_papo.model.policy import HeadRequest
    from megatron_papo.optimization.pipeline import score
    from megatron_papo.training.batching import pack_rows
    from megatron_papo.training.session import open_run
    from megatron_papo.weights.transfer import hf_tensors

    with open_run(config) as run:
        generator = build_generator(config, run.processor, run.layout)
        dataset = PromptDataset(config.data, "train", run.processor)
        head = HeadRequest(temperature=config.generation.temperature, banned_ids=run.banned_ids)
        sampling = make_sampling(temperature=config.generation.temperature, max_response_tokens=6)
        prompts = [dataset.prompt(row) for row in range(5)]

        def generated_rows():
            groups = generator.generate(prompts, sampling)
            return pack_rows(run, [replace(group, advantages=(0.0,) * len(group.rollouts)) for group in groups])

        generator.load_weights(hf_tensors(run.policy, run.shape, module_names=True), policy_version=0)
        first = generated_rows()
        with torch.no_grad():
            for parameter in run.policy.parameters():
                parameter.mul_(1.15)
        stale = [output.policy_logprobs_R for output in score(run.policy, first, head)]
        generator.load_weights(hf_tensors(run.policy, run.shape, module_names=True), policy_version=1)
        rows = generated_rows()
        scored = [output.policy_logprobs_R for output in score(run.policy, rows, head)]
        generator.close()
    gaps = torch.cat([found - row.rollout_logprobs_R for found, row in zip(scored, rows, strict=True)]).abs()
    moved = torch.cat([found - row.rollout_logprobs_R for found, row in zip(stale, first, strict=True)]).abs()
    return gaps.max().item(), gaps.numel(), moved.max().item()
