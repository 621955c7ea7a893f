"""A run that is killed while it writes a checkpoint, and resumed: the same numbers bit for bit on the same layout,
within rounding on another: more or fewer ranks, another number of data-parallel, tensor or pipeline ranks."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from megatron_papo.config import Config, dump_config
from megatron_papo.runtime.run_lock import Holder, exclusive_run
from tests.support.commands import Command, begin, papo
from tests.support.tiny_run import metrics, tiny_run

KILLED_AFTER = 2


def _start(config: Config, file: Path, ranks: int = 2) -> Command:
    file.write_text(dump_config(config))
    return begin("-m", "megatron_papo", "train", file, "--ranks", ranks, log=file.with_suffix(".log"))


def _run(config: Config, file: Path, ranks: int = 2) -> None:
    process = _start(config, file, ranks)
    assert process.wait(timeout=300) == 0, file.with_suffix(".log").read_text()


def _whole_checkpoints(run_dir: Path) -> list[int]:
    return sorted(int(path.parent.name[5:]) for path in (run_dir / "checkpoints").glob("step_*[0-9]/state.json"))


@pytest.fixture(scope="module")
def killed(inputs, tmp_path_factory):
    """A run that saves after each step and is killed, without a chance to clean up, while it writes one of its first
    checkpoints."""
    folder = tmp_path_factory.mktemp("killed")
    config = tiny_run(inputs, folder / "run", **SETTINGS)
    process = _start(config, folder / "first.yaml")
    deadline = time.monotonic() + 300
    saves = folder / "run/checkpoints"
    while max(_whole_checkpoints(folder / "run"), default=0) < KILLED_AFTER or not list(saves.glob("*.tmp")):
        assert time.monotonic() < deadline and process.poll() is None, (folder / "first.log").read_text()
        time.sleep(0.001)
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


def _resume(
    killed: Path, inputs: Path, folder: Path, ranks: int = 2, damage: bool = False, **settings
) -> tuple[int, list[dict]]:
    """`damage`: of the newest checkpoint, before it is resumed."""
    shutil.copytree(killed, folder / "run")
    *_, before, first = _whole_checkpoints(folder / "run")
    if damage:
        (folder / f"run/checkpoints/step_{first:08d}/state.json").write_bytes(b"")
        first = before
    steps = {"train__steps": first + 2}
    _run(tiny_run(inputs, folder / "run", **{**SETTINGS, **steps, **settings}), folder / "resumed.yaml", ranks)
    return first, metrics(folder / "run")


def test_same_layout_bit_for_bit(killed, undisturbed, inputs, tmp_path):
    first, found = _resume(killed, inputs, tmp_path)
    assert first >= KILLED_AFTER
    assert [line["step"] for line in found] == list(range(first + 2)), "every step stands once"
    compared = min(len(found), len(undisturbed))
    assert compared > first, "no resumed step was compared"
    assert json.dumps(found[:compared]) == json.dumps(undisturbed[:compared])
    assert _whole_checkpoints(tmp_path / "run")[-1] == first + 2
    assert not list((tmp_path / "run/checkpoints").glob("*.tmp")), "what the killed run left is cleared away"


def _check_close(undisturbed: list[dict], found: list[dict], first: int) -> None:
    compared = list(zip(undisturbed, found, strict=False))[first:]
    assert compared, "no resumed step was compared"
    for want, got in compared:
        wrong = {
            name: (want[name], got[name])
            for name in want
            if not math.isclose(want[name], got[name], rel_tol=2e-4, abs_tol=2e-5)
        }
        assert not wrong, f"step {want['step']}"


def test_a_second_run_in_the_folder_is_refused(inputs, tmp_path):
    config = tiny_run(inputs, tmp_path / "run", **SETTINGS)
    (tmp_path / "second.yaml").write_text(dump_config(config))
    with exclusive_run(config.run.dir, Holder.here("sft", {}, 60.0), takes=True):
        refused = papo("train", tmp_path / "second.yaml", "--ranks=2")
        assert refused.returncode == 2
        line = refused.stderr.splitlines()[-1]  # behind what the settings are warned of
        assert line.startswith(f"papo: error: run.dir: {config.run.dir} is in use by papo sft, process {os.getpid()}")
        assert os.listdir(config.run.dir) == ["lock"], "nothing of the first run is touched"


OTHERS = {
    "TP2 to PP2": (2, {"parallel__tensor": 1, "parallel__pipeline": 2}),
    "TP2 to DP2": (2, {"parallel__tensor": 1, "parallel__distributed_optimizer": True}),
    "TP2 to one rank, the newest checkpoint damaged": (1, {"damage": True, "parallel__tensor": 1}),
    "TP2 to TP2 DP2": (4, {}),
}


@pytest.mark.parametrize(("ranks", "settings"), OTHERS.values(), ids=OTHERS)
def test_another_layout_within_rounding(killed, undisturbed, inputs, tmp_path, ranks, settings):
    first, found = _resume(killed, inputs, tmp_path, ranks, **settings)
    _check_close(undisturbed, found, first)
    assert [line["step"] for line in found] == list(range(first + 2)), "every step stands once"
    if "damage" in settings:
        folder, said = tmp_path / "run/checkpoints", (tmp_path / "resumed.log").read_text()
        assert f"damaged checkpoint: {folder}/step_{first + 1:08d}/state.json: not JSON: " in said
        assert f"resumed from {folder}/step_{first:08d}, step {first}; " in said and "to be done again" in said
        assert (folder / f"step_{first + 1:08d}.damaged").is_dir()


def test_data_parallel_ranks_become_pipeline_stages(undisturbed, inputs, tmp_path):
    apart = {**SETTINGS, "train__steps": 2, "parallel__tensor": 1, "parallel__distributed_optimizer": True}
    _run(tiny_run(inputs, tmp_path / "first", **apart), tmp_path / "first.yaml")
    staged = {"parallel__tensor": 1, "parallel__pipeline": 2}
    first, found = _resume(tmp_path / "first", inputs, tmp_path, **staged)
    assert first == 2
    _check_close(undisturbed, found, first)
