"""vLLM inside the trainer's ranks, beside Megatron-Core: against transformers before and after weights change.

Each test starts real engines, which costs most of its time, so each checks many things in one start.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from transformers import AutoConfig

from megatron_papo.config import ParallelConfig
from megatron_papo.distributed.accelerator import adapt_megatron
from megatron_papo.distributed.layout import initialize, shutdown
from megatron_papo.generation import build_generator
from megatron_papo.generation.vllm.sleep import Sleeper, forget_weights, unwritten
from megatron_papo.generation.vllm.vllm_engine import VllmGenerator
from tests.parallel.generation_cases import (
    BANNED,
    EOS,
    TOLERANCE,
    largest_gap,
    make_config,
    make_folder,
    make_prompts,
    make_sampling,
    named_tensors,
    tokens,
)
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_model

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

SETTINGS = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "cut": {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
    "masked": {"temperature": 0.0, "masked": True},
    "hot": {"temperature": 2.0, "max_response_tokens": 40, "group_size": 8},
}
SAFE_IN_SLEEP = {"kv_cache", "_k_scale_cpu", "_v_scale_cpu"}
"""Tensors of an attention layer that are neither parameters nor buffers, and which sleep need not give back: keys and
values, which are made anew, and scales in host memory."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return _without_weights(make_folder(tmp_path_factory.mktemp("vllm") / "model"))


def _without_weights(folder: Path) -> Path:
    """Config, tokenizer and processor alone: the weights must come by hand-over."""
    for file in folder.glob("*.safetensors"):
        file.unlink()
    return folder


def _models(folder: Path) -> list[Any]:
    """Two models that differ in every tensor: the weights before and after a training step, drastically."""
    config = AutoConfig.from_pretrained(folder)
    return [tiny_model(config, seed=seed, std=0.12) for seed in (11, 12)]


def _both_engines(folder: Path, parallel: dict[str, int], engine_tensor: int) -> dict[str, Any]:
    """On one rank: what vLLM and transformers generate with each of two sets of weights, and the trainer's state."""
    adapt_megatron()
    layout = initialize(ParallelConfig(**parallel))
    config = make_config(folder, engine="vllm", tensor=engine_tensor, max_response_tokens=40, kv_cache_gib=0.05)
    processor, prompts = make_prompts(config)
    other = build_generator(make_config(folder), processor, layout)
    models = _models(folder)
    state, set_num_threads = _random_state(), torch.set_num_threads
    vllm = build_generator(config, processor, layout)
    loose = vllm.llm.apply_model(_loose_tensors)[0]
    mine = prompts[layout.data_rank :: layout.data_size]
    found: dict[str, Any] = {"megatron": [_megatron_norm()], "gaps": {}, "groups": [], "loose": loose}
    found["zeros"] = set(vllm.in_vllm.ZEROS)
    found["refused"] = _refusals({"no weights": lambda: vllm.generate(mine, make_sampling())})
    for version, model in enumerate(models):
        for generator in (vllm, other):
            # fresh tensors one at a time, as the trainer's export yields them
            generator.load_weights(((name, tensor.clone()) for name, tensor in named_tensors(model)), version)
        groups = {name: vllm.generate(mine, make_sampling(**changes)) for name, changes in SETTINGS.items()}
        expected = {name: other.generate(mine, make_sampling(**SETTINGS[name])) for name in ("greedy", "masked")}
        found["groups"].append((groups, expected))
        for name, changes in SETTINGS.items():
            found["gaps"][version, name] = largest_gap(model, groups[name], make_sampling(**changes))
    found["fixed"] = vllm.generate(mine, make_sampling(**SETTINGS["hot"], ignore_eos=True))
    if layout.data_size == 1:
        long = make_sampling(max_response_tokens=200)
        found["refused"] |= _refusals({"too long": lambda: vllm.generate(prompts[2:], long)})
    found["unwritten"] = [_forgotten(vllm)]
    vllm.load_weights(iter(named_tensors(models[1])), 1)
    found["unwritten"].append(vllm.llm.apply_model(unwritten)[0])
    text = prompts[1:2]  # batches with images wipe the places that they use
    found["text"] = [vllm.generate(text, make_sampling())]
    vllm.llm.apply_model(partial(_spoil, names=vllm.in_vllm.ZEROS))
    found["text"].append(vllm.generate(text, make_sampling()))
    awake, vllm.sleeper = vllm.sleeper, _Forgetful(vllm.llm, enabled=True, keeps_weights=False)
    vllm.load_weights(iter(named_tensors(models[1])), 1)
    vllm.sleeper = awake
    found["text"].append(vllm.generate(text, make_sampling()))
    found["again"] = vllm.generate(mine, make_sampling())
    found["random state kept"] = state == _random_state()
    found["threads kept"] = torch.set_num_threads is set_num_threads and torch.get_num_threads() == 1
    found["megatron"].append(_megatron_norm())
    vllm.close()
    found["shared memory left"] = [file.name for file in Path("/dev/shm").glob(f"*{vllm.shm_name}*")]
    shutdown()
    return found


def _forgotten(vllm: VllmGenerator) -> list[str]:
    """Parameters that are seen to be unwritten once all were forgotten."""
    vllm.llm.apply_model(forget_weights)
    return vllm.llm.apply_model(unwritten)[0]


class _Forgetful(Sleeper):
    """Of an engine that woke without its weights; without a GPU there is no sleep itself."""

    def sleep(self) -> None: ...


def _loose_tensors(model: torch.nn.Module) -> set[str]:
    """Attributes of the model and its modules with tensors that are neither parameters nor buffers: what a sleep of
    level 2 would lose."""
    found = set()
    for module in model.modules():
        for name, value in vars(module).items():
            values = (
                value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
            )
            if name not in ("_parameters", "_buffers") and any(isinstance(each, torch.Tensor) for each in values):
                found.add(name)
    return found


@torch.no_grad()
def _spoil(model: Any, names: Sequence[str]) -> None:
    """What a level 2 sleep may leave in the tensors that have to be zero."""
    for name in names:
        for tensor in getattr(model, name):
            tensor.fill_(1.0)


def _random_state() -> tuple:
    return random.getstate(), tuple(numpy.random.get_state()[1]), tuple(torch.get_rng_state().tolist())


def _megatron_norm() -> float:
    """A tensor-parallel layer of Megatron-Core at work in the same process, its group included."""
    from megatron.core import tensor_parallel
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2, use_cpu_initialization=True)
    layer = tensor_parallel.RowParallelLinear(
        8, 8, config=config, init_method=lambda weight: weight.fill_(0.5), bias=False, input_is_parallel=False,
        skip_bias_add=True,
    )  # fmt: skip
    return layer(torch.ones(2, 1, 8))[0].norm().item()


def _check(found: dict[str, Any]) -> None:
    for (version, name), gap in found["gaps"].items():
        assert gap < TOLERANCE, f"weights {version}, {name}: log-probs differ from transformers' by {gap}"
    for version, (groups, expected) in enumerate(found["groups"]):
        for name in ("greedy", "masked"):
            assert tokens(groups[name]) == tokens(expected[name])
        for group in (group for several in groups.values() for group in several):
            for rollout in group.rollouts:
                assert rollout.policy_version == version and not set(rollout.response_ids) & set(BANNED)
                assert (rollout.finish_reason == "stop") == (EOS in rollout.response_ids)
                assert EOS not in rollout.response_ids[:-1]
    (before, _), (after, _) = found["groups"]
    for ended, fixed in zip(after["hot"], found["fixed"]):
        for short, full in zip(ended.rollouts, fixed.rollouts):
            assert (len(full.response_ids), full.finish_reason) == (40, "length")
            assert full.response_ids[: len(short.response_ids)] == short.response_ids
    for group, later in zip(before["plain"], after["plain"]):
        assert len({rollout.response_ids for rollout in group.rollouts}) == 4
        assert not {r.response_ids for r in group.rollouts} & {r.response_ids for r in later.rollouts}
    assert tokens(found["again"]) == tokens(after["plain"])
    assert found["loose"] == found["zeros"] | SAFE_IN_SLEEP
    healthy, spoilt, refilled = map(tokens, found["text"])
    assert healthy == refilled and (spoilt != healthy) == bool(found["zeros"])
    forgotten, left = found["unwritten"]
    assert {"language_model.model.norm.weight", "visual.blocks.0.norm1.weight"} <= set(forgotten) and left == []
    assert found["random state kept"] and found["threads kept"]
    assert not found["shared memory left"]
    assert found["megatron"] == [16.0, 16.0]  # 16 outputs of 8 x 0.5


def test_an_engine_a_rank_in_a_tensor_parallel_group(folder):
    first, second = run_ranks(_both_engines, 2, folder, {"tensor": 2}, 1)
    for found in (first, second):
        _check(found)
        assert found["refused"] == {
            "no weights": "RuntimeError: generate before the first load_weights: the generator has no weights",
            "too long": "ValueError: prompt row-2: 72 tokens and a response of 200 exceed the engine's 240",
        }
    for mine, other in zip(first["groups"], second["groups"]):
        for name in SETTINGS:
            assert tokens(mine[0][name]) == tokens(other[0][name])
    rollouts = [rollout for group in first["groups"][0][0]["hot"] for rollout in group.rollouts]
    assert {rollout.finish_reason for rollout in rollouts} == {"stop", "length"}


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_an_engine_over_two_data_parallel_ranks(family, tmp_path):
    """The ranks of the engine bring different prompts, and each gets its own answered; and the head is tied."""
    folder = _without_weights(make_folder(tmp_path / "tied", family=family, tie=True))
    first, second = run_ranks(_both_engines, 2, folder, {}, 2)
    for found, ids in ((first, ["row-0", "row-2", "row-4"]), (second, ["row-1", "row-3"])):
        _check(found)
        for groups, _ in found["groups"]:
            assert [group.prompt.id for group in groups["plain"]] == ids


def _refusals(steps: dict[str, Callable[[], Any]]) -> dict[str, str]:
    found = {}
    for name, step in steps.items():
        try:
            step()
        except (RuntimeError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def test_settings_that_vllm_does_not_take_are_refused_before_it_starts(folder):
    for settings, message in (
        ({"temperature": 2.5}, "generation.temperature=2.5: vLLM takes 0 to 2"),
        ({"tensor": 2}, "generation.tensor=2 does not divide the 1 ranks"),
    ):
        (found,) = run_ranks(_build_alone, 1, folder, settings)
        assert found == {"build": f"ValueError: {message}"}


def _build_alone(folder: Path, settings: dict[str, Any]) -> dict[str, str]:
    adapt_megatron()
    layout = initialize(ParallelConfig())
    config = make_config(folder, engine="vllm", **settings)
    processor, _ = make_prompts(config)
    return _refusals({"build": lambda: build_generator(config, processor, layout)})
