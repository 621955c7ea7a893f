"""Rows that cannot be prompts, as a user meets them: named and counted, or the end of the run."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from megatron_papo.config import dump_config
from tests.support.commands import papo
from tests.support.tiny_run import make_inputs, metrics, tiny_run


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """The usual rows, a truncated picture in row 1, and a placeholder too many in row 4."""
    folder = make_inputs(tmp_path_factory.mktemp("inputs"))
    (folder / "1_0.png").write_bytes((folder / "1_0.png").read_bytes()[:60])
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    rows[4]["problem"] = "<image>" + rows[4]["problem"]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bad = {"problem": "<image>how many?", "answer": "3", "images": ["gone.png"]}
    (folder / "all_bad.jsonl").write_text((json.dumps(bad) + "\n") * 3)
    return folder


def _train(inputs: Path, folder: Path, action: str) -> subprocess.CompletedProcess:
    return papo("train", _config(inputs, folder, action), "--ranks", 2)


def _config(inputs: Path, folder: Path, action: str) -> Path:
    """Of a run that evaluates on rows of which none is good."""
    config = tiny_run(
        inputs, folder / "run", data__on_bad_row=action, data__shuffle="false", data__eval=inputs / "all_bad.jsonl"
    )
    (folder / "config.yaml").write_text(dump_config(config))
    return folder / "config.yaml"


def test_skipped_rows_are_named_and_counted(inputs, tmp_path):
    done = _train(inputs, tmp_path, "skip")
    assert done.returncode == 0, done.stderr
    assert len(metrics(tmp_path / "run")) == 2, "replacements keep the batch full"
    named = [line for line in done.stderr.splitlines() if "data.train: row" in line]
    assert len(named) == 2
    assert "row 1: corrupt image" in named[0] and "row 4: placeholder count" in named[1]
    assert "corrupt image 1, placeholder count 1" in done.stderr
    (nothing,) = [line for line in done.stderr.splitlines() if "no good row left" in line]
    assert "papo: warning: data.eval: no good row left in" in nothing, "training goes on without it"
    assert not any(name.startswith("eval/") for line in metrics(tmp_path / "run") for name in line)


def test_by_default_the_first_one_ends_the_run(inputs, tmp_path):
    done = _train(inputs, tmp_path, "stop")
    assert done.returncode == 1
    assert "row 1: corrupt image" in done.stderr.splitlines()[-1]


def test_an_evaluation_without_a_good_row_fails(inputs, tmp_path):
    done = papo("eval", _config(inputs, tmp_path, "skip"))
    assert done.returncode == 1 and "score" not in done.stdout
    last = done.stderr.splitlines()[-1]
    assert f"data.eval: no good row left in {inputs}/all_bad.jsonl, of 3: nothing was evaluated" in last
    assert "evaluated: image file missing 3; the first: row 0: image file missing (" in last
    assert "image file missing 3" in done.stderr
    assert not (tmp_path / "run/eval.jsonl").exists()
