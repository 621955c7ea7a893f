"""Rows that cannot be prompts, as a user meets them: named and counted, or the end of the run."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from megatron_papo.config import dump_config
from tests.commands import papo
from tests.tiny_run import make_inputs, metrics, tiny_run


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """The usual rows, a truncated picture in row 1, and a placeholder too many in row 4."""
    folder = make_inputs(tmp_path_factory.mktemp("inputs"))
    (folder / "1_0.png").write_bytes((folder / "1_0.png").read_bytes()[:60])
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    rows[4]["problem"] = "<image>" + rows[4]["problem"]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _train(inputs: Path, folder: Path, action: str) -> subprocess.CompletedProcess:
    config = tiny_run(inputs, folder / "run", data__on_bad_row=action, data__shuffle="false")
    (folder / "config.yaml").write_text(dump_config(config))
    return papo("train", folder / "config.yaml", "--ranks", 2)


def test_skipped_rows_are_named_and_counted(inputs, tmp_path):
    done = _train(inputs, tmp_path, "skip")
    assert done.returncode == 0, done.stderr
    assert len(metrics(tmp_path / "run")) == 2, "replacements keep the batch full"
    named = [line for line in done.stderr.splitlines() if "data.train: row" in line]
    assert len(named) == 2
    assert "row 1: corrupt image" in named[0] and "row 4: placeholder count" in named[1]
    assert "corrupt image 1, placeholder count 1" in done.stderr


def test_by_default_the_first_one_ends_the_run(inputs, tmp_path):
    done = _train(inputs, tmp_path, "stop")
    assert done.returncode == 1
    assert "row 1: corrupt image" in done.stderr.splitlines()[-1]
