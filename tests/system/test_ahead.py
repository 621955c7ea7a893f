"""`papo train train.ahead=true` as a user runs it, with a real engine: the curve, the age of its rollouts, a trainer
that is killed and goes on bit for bit, an engine that does not start, and layouts that are refused."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_papo.config import Config, dump_config
from tests.support.commands import Command, begin
from tests.support.inputs import FOR_VLLM
from tests.support.tiny_run import CERTIFIED, metrics, tiny_run

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

AHEAD = {
    "generation__engine": "vllm",
    "generation__placement": "separate",
    "generation__kv_cache_gib": 0.05,
    "train__ahead": True,
    "train__steps": 4,
    "loss__correction": "truncated",
    "checkpoint__save_every": 1,
    "run__heartbeat_s": 0.5,
    "train__eval_at_start": True,
    "eval__limit": 2,
    "eval__samples": 1,
    "eval__masked": False,
    **CERTIFIED,
}
MODEL = FOR_VLLM


def _start(config: Config, file: Path, *words: str) -> Command:
    file.write_text(dump_config(config))
    return begin("-m", "megatron_papo", "train", file, *words, log=file.with_suffix(".log"), vllm=True)


def _run(config: Config, file: Path, *words: str) -> tuple[int, list[str]]:
    """The exit code and the lines it printed."""
    code = _start(config, file, *words).wait(timeout=200)
    return code, file.with_suffix(".log").read_text().splitlines()


def _curve(run_dir: Path) -> list[dict[str, Any]]:
    """Without what the engine measures of itself, which a checkpoint does not keep."""
    lines = metrics(run_dir)
    return [{name: value for name, value in line.items() if not name.startswith("engine/")} for line in lines]


def _sign(run_dir: Path, rank: int) -> psutil.Process:
    return psutil.Process(json.loads((run_dir / "heartbeats" / f"rank_{rank}.json").read_text())["pid"])


def test_a_killed_trainer_goes_on_as_if_it_had_not_been_killed(inputs, tmp_path):
    undisturbed, settings = tmp_path / "undisturbed", {**AHEAD, "data__eval": inputs / "rows.jsonl"}
    code, printed = _run(tiny_run(inputs, undisturbed, **settings), tmp_path / "undisturbed.yaml")
    assert code == 0, printed
    assert "papo: starting 2 ranks" in printed
    start, *curve = _curve(undisturbed)
    assert start["step"] == -1 and "eval/accuracy" in start and "eval/accuracy" in curve[-1]
    assert [line["rollout_age"] for line in curve] == [0, 1, 1, 1]
    assert curve[0]["rollout_gap"] < 1e-4 < 1e-2 < min(line["rollout_gap"] for line in curve[1:])
    assert curve[0]["correction"] == pytest.approx(1, abs=1e-4)

    config = tiny_run(inputs, tmp_path / "killed", **settings)
    process = _start(config, tmp_path / "killed.yaml")
    deadline = time.monotonic() + 150
    while not (tmp_path / "killed/checkpoints/step_00000002/state.json").exists():
        assert time.monotonic() < deadline and process.poll() is None, (tmp_path / "killed.log").read_text()
        time.sleep(0.01)
    (engine,) = [child for child in _sign(tmp_path / "killed", 1).children() if "spawn_main" in str(child.cmdline())]
    _sign(tmp_path / "killed", 0).kill()
    assert process.wait(timeout=10) == 1
    assert "papo: rank 0 failed: killed: by signal SIGKILL" in (tmp_path / "killed.log").read_text()
    engine.wait(timeout=5)  # it does not outlive its trainer

    code, printed = _run(config, tmp_path / "killed.yaml")
    assert code == 0, printed
    assert any("resumed from" in line for line in printed)
    assert json.dumps(_curve(tmp_path / "killed")) == json.dumps([start, *curve])


def test_an_engine_that_does_not_start_ends_the_run_with_its_reason(inputs, tmp_path):
    config = tiny_run(inputs, tmp_path / "run", **AHEAD | {"generation__kv_cache_gib": 1e-7})
    code, printed = _run(config, tmp_path / "run.yaml")
    assert code == 1
    assert printed[-1].startswith("papo: rank 1 failed: ValueError: engine 0 did not start: ValueError: "), printed[-1]


@pytest.mark.parametrize(
    ("settings", "words", "fault"),
    [
        (
            {"generation__tensor": 3},
            (),
            "generation.tensor: 4 attention heads do not divide by 3",
        ),
        (
            {"parallel__tensor": 2},
            ("--ranks", "2"),
            "generation.engines: 2 ranks less 1 engines of generation.tensor=1 leave 1, which is no multiple of "
            "parallel.tensor=2 x parallel.pipeline=1",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_ranks_start(inputs, tmp_path, settings, words, fault):
    code, printed = _run(tiny_run(inputs, tmp_path / "run", **AHEAD, **settings), tmp_path / "run.yaml", *words)
    assert code == 2
    assert f"papo: error: {fault}" in printed
    assert not any("starting" in line for line in printed)
