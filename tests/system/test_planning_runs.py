"""A run beside its plan: the figures of every step, the planner fitted to the run, and what it says of a bad one."""

from __future__ import annotations

import json
import statistics
import subprocess
from pathlib import Path

import pytest

from megatron_papo.config import Config, load_config
from megatron_papo.costs.hardware import CPU
from megatron_papo.costs.stages import PLANNED_STAGES
from megatron_papo.model.shape import ModelShape
from megatron_papo.planning.assumptions import Assumptions, factor_of
from megatron_papo.planning.measured_run import planned
from tests.support.commands import run
from tests.support.ranks import run_ranks
from tests.support.tiny_run import make_inputs, tiny_run

ROOT = Path(__file__).parents[2]


def _train(*configs: Config) -> None:
    from megatron_papo.planning.measured_run import step_planner
    from megatron_papo.train import main

    for config in configs:
        main(config, step_planner)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("planned")
    config = tiny_run(make_inputs(folder / "inputs"), folder / "run", train__steps=4)
    run_ranks(_train, 1, config)
    return config.run.dir


def _records(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def _tool(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return run(ROOT / "tools" / "plan.py", *words)


def test_every_step_has_its_plan_beside_it(run_dir):
    for record in _records(run_dir):
        assert record["ranks"] == 1 and record["prompt_tokens"] > record["image_tokens"] > 0
        for stage in PLANNED_STAGES:
            assert record[f"planned/time/{stage}"] > 0 and record[f"time/{stage}"] > 0
        assert record["planned/memory_gib"] > 0


def test_fitted_to_a_run_the_plan_takes_what_the_run_took(run_dir, tmp_path):
    config = load_config(run_dir / "config.yaml")
    out = tmp_path / "fitted.json"
    words = ("--model", config.model.path, "--nodes", "1", "--gpus-per-node", "1", "--gpu", "CPU")
    done = _tool(*words, "--calibrate", run_dir, "--calibration", out, "model.dtype=float32")
    assert done.returncode == 0, done.stderr
    fitted, shape = Assumptions.load(out), ModelShape.from_folder(config.model.path)
    for stage in PLANNED_STAGES:
        assert getattr(fitted, factor_of(stage)) != 1
        ratios = [
            record[f"time/{stage}"] / planned(config, shape, CPU, 1, fitted, record).seconds[stage]
            for record in _records(run_dir)[1:]
        ]
        assert statistics.median(ratios) == pytest.approx(1, rel=1e-6)


def test_a_folder_that_is_no_run_is_one_line(tmp_path):
    done = _tool("--model", "Qwen2.5-VL-7B", "--nodes", "1", "--calibrate", tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"plan: error: {tmp_path}/metrics.jsonl: no metrics of a run")
