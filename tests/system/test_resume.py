"""A run that is killed and resumed: the same numbers bit for bit on the same layout, within rounding on another."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_papo.config import Config, dump_config
from tests.tiny_run import make_inputs, metrics, tiny_run

STEPS, KILLED_AFTER = 4, 2


def _command(config: Config, file: Path) -> list[str]:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(dump_config(config))
    return [sys.executable, "-m", "megatron_papo.cli", "train", str(file)]


def _start(config: Config, file: Path) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    log = file.with_suffix(".log").open("w")
    return subprocess.Popen(
        _command(config, file), stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
    )


def _run(config: Config, file: Path) -> None:
    process = _start(config, file)
    assert process.wait(timeout=300) == 0, file.with_suffix(".log").read_text()


def _steps_recorded(run_dir: Path) -> int:
    record = run_dir / "metrics.jsonl"
    return len(record.read_text().splitlines()) if record.exists() else 0


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def killed(inputs, tmp_path_factory):
    """A run of four steps that saves after each and is killed, without a chance to clean up, in its third or later."""
    folder = tmp_path_factory.mktemp("killed")
    config = tiny_run(inputs, folder / "run", **SETTINGS)
    process = _start(config, folder / "first.yaml")
    deadline = time.monotonic() + 300
    while _steps_recorded(folder / "run") < KILLED_AFTER + 1 and process.poll() is None:
        assert time.monotonic() < deadline, (folder / "first.log").read_text()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return folder / "run"


SETTINGS = {
    "train__steps": 40,
    "checkpoint__save_every": 1,
    "parallel__tensor": 2,
    "loss__entropy_coef": 0.03,
}
"""Forty steps: the kill always comes before the end; the schedule is constant, so that only the first four count."""


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    _run(tiny_run(inputs, folder / "run", **{**SETTINGS, "train__steps": 6}), folder / "config.yaml")
    return metrics(folder / "run")


def _resume(killed: Path, inputs: Path, folder: Path, **settings) -> tuple[int, list[dict]]:
    shutil.copytree(killed, folder / "run")
    first = max(int(path.name[5:]) for path in (folder / "run" / "checkpoints").glob("step_*[0-9]"))
    steps = {"train__steps": first + 2}
    _run(tiny_run(inputs, folder / "run", **{**SETTINGS, **steps, **settings}), folder / "resumed.yaml")
    return first, metrics(folder / "run")


def test_same_layout_bit_for_bit(killed, undisturbed, inputs, tmp_path):
    first, found = _resume(killed, inputs, tmp_path)
    assert first >= KILLED_AFTER
    assert [line["step"] for line in found] == list(range(first + 2)), "every step stands once"
    compared = min(len(found), len(undisturbed))
    assert compared > first, "no resumed step was compared"
    assert json.dumps(found[:compared]) == json.dumps(undisturbed[:compared])


def test_another_layout_within_rounding(killed, undisturbed, inputs, tmp_path):
    first, found = _resume(killed, inputs, tmp_path, parallel__tensor=1, parallel__pipeline=2)
    for want, got in list(zip(undisturbed, found, strict=False))[first:]:
        wrong = {
            name: (want[name], got[name])
            for name in want
            if not math.isclose(want[name], got[name], rel_tol=2e-4, abs_tol=2e-5)
        }
        assert not wrong, f"step {want['step']}"
