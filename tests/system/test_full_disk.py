"""A disk that fills up under a run: it costs checkpoints, not the run; without the last checkpoint the run says why."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from megatron_papo.config import Config, dump_config
from tests.support.commands import Command, begin
from tests.support.small_disk import fill, make_room, small_disk
from tests.support.tiny_run import tiny_run

STEPS = 20


def _start(config: Config, file: Path) -> tuple[Command, Path]:
    file.write_text(dump_config(config))
    log = file.with_suffix(".log")
    return begin("-m", "megatron_papo", "train", file, log=log), log


def _records(run_dir: Path) -> list[dict]:
    file = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_the_run_goes_on_and_saves_again_when_there_is_room(inputs, tmp_path):
    with small_disk(tmp_path / "disk", 16) as disk:
        settings = {"train__steps": STEPS, "checkpoint__save_every": 1, "parallel__tensor": 2}
        run_dir = disk / "run"
        process, log = _start(tiny_run(inputs, run_dir, observe__samples_every=2, **settings), tmp_path / "run.yaml")
        deadline = time.monotonic() + 200
        full_at = 0
        while len(_records(run_dir)) < 3 or log.read_text().count("was not saved") < 2:
            assert time.monotonic() < deadline and process.poll() is None, log.read_text()
            if len(_records(run_dir)) >= 3:
                fill(disk)  # again what a checkpoint that failed gave back
                full_at = full_at or len(_records(run_dir))
            time.sleep(0.02)
        assert process.poll() is None, log.read_text()
        make_room(disk)
        assert process.wait(timeout=200) == 0, log.read_text()

        said = log.read_text()
        warnings = [line for line in said.splitlines() if "was not saved" in line]
        assert all(line.startswith("papo: warning: checkpoint of step ") for line in warnings)
        assert all(": No space left on device: " in line for line in warnings)
        assert "; the last good one is step " in warnings[-1]
        records = _records(run_dir)
        assert [record["step"] for record in records] == list(range(STEPS)), "every step once, none torn"
        assert records[0]["checkpoints_failed"] == 0
        assert records[-1]["checkpoints_failed"] == len(warnings)
        assert len(list((run_dir / "samples").glob("*.html"))) == STEPS // 2 + 1
        whole = sorted(path.parent.name for path in (run_dir / "checkpoints").glob("*/state.json"))
        assert whole == [f"step_{STEPS - 1:08d}", f"step_{STEPS:08d}"]
        assert not list((run_dir / "checkpoints").glob("*.tmp"))


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_run_that_cannot_save_its_last_step_fails_with_the_reason(inputs, tmp_path, asynchronous):
    with small_disk(tmp_path / "disk", 4) as disk:
        fill(disk)
        config = tiny_run(inputs, disk / "run", checkpoint__save_every=1, checkpoint__asynchronous=asynchronous)
        process, log = _start(config, tmp_path / "run.yaml")
        assert process.wait(timeout=200) == 1, log.read_text()
        lines = log.read_text().splitlines()
        said = [line for line in lines if line.startswith("papo: ") and "was not saved" in line]
        assert len(said) == 3, "each checkpoint once, and the reason"
        assert lines[-1].startswith(
            "papo: rank 0 failed: SaveFailed: checkpoint of step 2 was not saved: rank 0: No space left on device: "
        )
        assert lines[-1].endswith("there is no earlier one")
        assert any("metrics.jsonl: the last 2 records could not be written" in line for line in lines)
