"""Engines on ranks of their own, real vLLM throughout: sampling and training agree on every token, rollouts are those
of a colocated engine, and an engine that is killed is started again with the same rollouts."""

from __future__ import annotations

import importlib.util
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from megatron_papo.config import Config
from megatron_papo.types import Group, Prompt
from tests.parallel.generation_cases import make_sampling, tokens
from tests.support.inputs import FOR_VLLM
from tests.support.ports import beyond_loopback, listening, of_the_store_at
from tests.support.ranks import run_ranks
from tests.support.tiny_run import tiny_run

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

ENGINE = {"generation__engine": "vllm", "generation__kv_cache_gib": 0.05}
SEPARATE = ENGINE | {"generation__placement": "separate"}
TOLERANCE = 2e-4
SAMPLING = {"max_response_tokens": 6, "temperature": 1.3}
VERSION = 7
MODEL = FOR_VLLM
"""Of the inputs where a test takes no family."""
SECOND_FAMILY = {**FOR_VLLM, "family": "qwen3_vl"}


@dataclass
class Trainer:
    run: Any
    generator: Any
    prompts: list[Prompt]
    """Of this data-parallel rank."""

    def ask(self) -> list[Group]:
        from megatron_papo.training.rollouts import generate

        return generate(self.run, self.generator, self.prompts, make_sampling(**SAMPLING))

    def hand_over(self, version: int) -> None:
        from megatron_papo.training.rollouts import hand_over

        hand_over(self.run, self.generator, version)

    def change_weights(self) -> None:
        with torch.no_grad():
            for parameter in self.run.policy.parameters():
                parameter.mul_(1.15)


@contextmanager
def _trainer(config: Config) -> Iterator[Trainer]:
    from megatron_papo.data.dataset import PromptDataset
    from megatron_papo.generation import build_generator
    from megatron_papo.training.session import open_run

    with open_run(config, config.generation.num_engine_ranks) as run:
        generator = build_generator(config, run.processor, run.layout, run.clock.report)
        dataset = PromptDataset(config.data, "train", run.processor)
        rows = range(run.layout.data_rank, 6, run.layout.data_size)
        yield Trainer(run, generator, [dataset.prompt(row) for row in rows])
        generator.close()


def _gaps(trainer: Trainer, groups: list[Group]) -> torch.Tensor:
    """Between the engine's log-probs and those that the trainer's policy has now, of every token."""
    from megatron_papo.model.policy import HeadRequest
    from megatron_papo.optimization.pipeline import score
    from megatron_papo.training.batching import pack_rows

    run = trainer.run
    head = HeadRequest(temperature=SAMPLING["temperature"], banned_ids=run.banned_ids)
    rows = pack_rows(run, [replace(group, advantages=(0.0,) * len(group.rollouts)) for group in groups])
    outputs = score(run.policy, rows, head)
    gaps = [output.policy_logprobs_R - row.rollout_logprobs_R for output, row in zip(outputs, rows, strict=True)]
    return torch.cat(gaps).abs()


def _serve(config: Config) -> dict[str, Any]:
    from megatron_papo.training.engine_rank import serve

    return {"exit code": serve(config)}


def _reachable(config: Config) -> set[Any]:
    """Where others than this machine could reach a rank or an engine, and the mode of the key where it is not 600."""
    processes = of_the_store_at(int(os.environ["MASTER_PORT"]))
    places = listening(processes)
    assert len({process for process, *_ in places}) == dist.get_world_size() + config.generation.num_engine_ranks
    modes = (
        {oct((config.run.dir / "engines.key").stat().st_mode & 0o777)} if config.generation.num_engine_ranks else set()
    )
    return beyond_loopback(places) | modes - {"0o600"}


def _agrees(config: Config) -> dict[str, Any]:
    """Before and after every weight has changed: gaps, rollouts, versions."""
    from megatron_papo.training.engine_rank import serves

    if serves(config):
        return _serve(config)
    found: dict[str, Any] = {"gaps": [], "groups": {}, "versions": []}
    with _trainer(config) as trainer:
        for version in (VERSION, VERSION + 1):
            trainer.hand_over(version)
            groups = trainer.ask()
            found["gaps"].append(_gaps(trainer, groups).max().item())
            found["versions"].append({rollout.policy_version for group in groups for rollout in group.rollouts})
            trainer.change_weights()
            if version == VERSION:
                found["reachable"] = _reachable(config) if trainer.run.is_writer else set()
                found["moved"] = _gaps(trainer, groups).max().item()
                found["groups"] = {group.prompt.id: group.rollouts for group in groups}
                found["metrics"] = trainer.generator.take_metrics()
    return found


def _rollouts(found: list[dict[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for each in found:
        for name, rollouts in each.get("groups", {}).items():
            assert merged.setdefault(name, rollouts) == rollouts, "ranks of a group have the same rollouts"
    return merged


@pytest.fixture(scope="module")
def colocated(inputs, tmp_path_factory) -> dict[str, Any]:
    return _colocated(inputs, tmp_path_factory.mktemp("run"))


def _colocated(inputs: Path, run_dir: Path) -> dict[str, Any]:
    """The rollouts of an engine within the trainer's only rank."""
    found = run_ranks(_agrees, 1, tiny_run(inputs, run_dir, **ENGINE))
    assert found[0]["reachable"] == set()
    return _rollouts(found)


def _check_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Token for token; the log-probs may differ by what a batch of another size does to a sum."""
    assert found.keys() == wanted.keys() and len(found) == 6
    for name, rollouts in found.items():
        for got, want in zip(rollouts, wanted[name], strict=True):
            assert replace(got, rollout_logprobs=()) == replace(want, rollout_logprobs=())
            assert got.rollout_logprobs == pytest.approx(want.rollout_logprobs, abs=1e-5)


LAYOUTS = {
    "trainer DP 2, an engine TP 2": (4, {"generation__tensor": 2}),
    "trainer DP 2, two engines": (4, {"generation__engines": 2}),
}


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=pytest.mark.slow if "two engines" in name else ()) for name in LAYOUTS]
)
def test_sampling_and_training_agree_and_the_place_of_the_engine_does_not_matter(layout, inputs, colocated, tmp_path):
    _check_place(layout, inputs, colocated, tmp_path)


@pytest.mark.slow
def test_so_it_is_with_the_second_family(inputs_of, tmp_path):
    inputs = inputs_of(**SECOND_FAMILY)
    _check_place("trainer DP 2, an engine TP 2", inputs, _colocated(inputs, tmp_path / "colocated"), tmp_path)


def _check_place(layout: str, inputs: Path, colocated: dict[str, Any], tmp_path: Path) -> None:
    num_ranks, settings = LAYOUTS[layout]
    config = tiny_run(inputs, tmp_path / "run", **SEPARATE, **settings)
    found = run_ranks(_agrees, num_ranks, config)
    trainer, engines = found[: -config.generation.num_engine_ranks], found[-config.generation.num_engine_ranks :]
    assert engines == [{"exit code": 0}] * len(engines)
    for each in trainer:
        assert max(each["gaps"]) < TOLERANCE
        assert each["moved"] > 0.1, "the hand-over mattered"
        assert each["versions"] == [{VERSION}, {VERSION + 1}]
        assert each["metrics"]["engine/seconds"][0] > 0
        assert each["reachable"] == set()
    _check_same(_rollouts(trainer), colocated)
    assert not list((tmp_path / "run/heartbeats").glob("*")), "every rank took its sign of life away"
    assert not (tmp_path / "run/engines.key").exists()


def _engine_process(config: Config, rank: int) -> psutil.Process:
    sign = json.loads((config.run.dir / "heartbeats" / f"rank_{rank}.json").read_text())
    for child in psutil.Process(sign["pid"]).children():
        with suppress(psutil.ZombieProcess):  # the engine before, not waited for yet
            if "spawn_main" in " ".join(child.cmdline()):
                return child
    raise AssertionError("the engine runs")


def _survives(config: Config) -> dict[str, Any]:
    """A trainer of two tensor ranks, its engine killed while it generates, then while it idles."""
    from megatron_papo.training.engine_rank import serves
    from megatron_papo.training.rollouts import collect

    if serves(config):
        return _serve(config)
    found: dict[str, Any] = {}
    engine_rank, told = 2, io.StringIO()
    with redirect_stderr(told), _trainer(config) as trainer:
        run, generator, sampling = trainer.run, trainer.generator, make_sampling(**SAMPLING)
        trainer.hand_over(VERSION)
        undisturbed = trainer.ask()
        found["groups"] = {group.prompt.id: group.rollouts for group in undisturbed}
        generator.submit(trainer.prompts, sampling)
        if run.is_writer:
            _engine_process(config, engine_rank).kill()
        disturbed = collect(run, generator, trainer.prompts, sampling, VERSION)
        found["same"] = tokens(disturbed) == tokens(undisturbed)
        found["versions"] = {rollout.policy_version for group in disturbed for rollout in group.rollouts}
        if run.is_writer:
            idle = _engine_process(config, engine_rank)
            idle.kill()
            idle.wait(10)
        trainer.change_weights()
        trainer.hand_over(VERSION + 1)
        groups = trainer.ask()
        found["gap"] = _gaps(trainer, groups).max().item()
        found["restarts"] = run.counts["engine_restarts"]
    found["told"] = [line for line in told.getvalue().splitlines() if "engine" in line]
    return found


def test_an_engine_that_is_killed_is_started_again_with_the_same_rollouts(inputs, colocated, tmp_path):
    small = {"generation__restarts": 2, "generation__bucket_mib": 1}
    config = tiny_run(inputs, tmp_path / "run", parallel__tensor=2, **small, **SEPARATE)
    *trainer, engine = run_ranks(_survives, 3, config)
    assert engine == {"exit code": 0}
    _check_same(_rollouts(trainer), colocated)
    again = "; it is started again and asked the same"  # noticed when the hand-over begins, or just within it
    told = [
        f"papo: warning: engine 0 died (signal 9) while it made rollouts{again}",
        f"papo: warning: engine 0 died (signal 9) before the weights were handed over{again}",
    ]
    for rank, found in enumerate(trainer):
        found["told"] = [line.replace("while the weights were", "before the weights were") for line in found["told"]]
        found.pop("groups")
        assert found.pop("gap") < TOLERANCE
        assert found == {"same": True, "versions": {VERSION}, "restarts": 2, "told": [] if rank else told}
