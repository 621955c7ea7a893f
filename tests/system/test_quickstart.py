"""The quickstart as a newcomer runs it: cut short with real ranks, and (slow) whole, with what it promises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
every_family = pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])


def run_quickstart(out: Path, *arguments: str, timeout_s: float) -> str:
    """What it printed; fails the test with that when the exit code is not 0."""
    command = [
        sys.executable,
        str(ROOT / "examples" / "quickstart" / "run.py"),
        "--out",
        str(out),
        *arguments,
    ]
    environment = {**os.environ, "COLUMNS": "160", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        timeout=timeout_s,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


def check_outcome(out: Path, printed: str) -> dict:
    """What every run leaves behind; its summary."""
    summary = json.loads((out / "summary.json").read_text())
    for scores in (summary["before"], summary["after"]):
        assert 0 <= scores["masked_accuracy"] <= 1 and 0 <= scores["accuracy"] <= 1 and 0 <= scores["format"] <= 1
        assert scores["gap"] == pytest.approx(scores["accuracy"] - scores["masked_accuracy"])
        assert scores["perception_kl"] >= 0
    for title in ("accuracy", "format rate", "accuracy, image masked", "gap", "perception KL"):
        assert title in (out / "table.md").read_text() and title in printed
    for name in ("papo/export/model.safetensors", "papo/export/config.json", "papo/metrics.jsonl"):
        assert (out / name).exists()
    with Image.open(out / "curves.png") as picture:
        assert picture.width > 600 and len(set(picture.convert("L").getdata())) > 20
    assert "data:image/png;base64," in max((out / "papo" / "samples").glob("*.html")).read_text()
    for place in (out / "papo" / "export", out / "curves.png", max((out / "papo" / "checkpoints").glob("step_*"))):
        assert str(place) in printed
    return summary


@every_family
def test_cut_short(tmp_path, family):
    short = ["sft.steps=6", "train.steps=3", "train.eval_every=0", "eval.limit=12"]
    out = tmp_path / "run"
    printed = run_quickstart(out, "--family", family, "--seed", "5", *short, timeout_s=400)
    summary = check_outcome(out, printed)
    assert (summary["family"], summary["seed"], summary["engine"]) == (family, 5, "transformers")
    assert json.loads((out / "papo" / "export" / "config.json").read_text())["model_type"] == family
    assert printed.count("$ papo ") == 4 and "$ papo train" in printed
    records = [json.loads(line) for line in (out / "papo" / "metrics.jsonl").read_text().splitlines()]
    assert {record["step"] for record in records} == {0, 1, 2}
    assert "tensor: 2" in (out / "papo" / "config.yaml").read_text()


def test_a_failing_command_ends_it(tmp_path):
    with pytest.raises(AssertionError, match=r"sft\.stepz: unknown key"):
        run_quickstart(tmp_path / "run", "sft.stepz=6", timeout_s=200)


@pytest.mark.slow
@pytest.mark.timeout(1600)
@every_family
def test_whole(tmp_path, family):
    """Held-out accuracy rises by 0.2 at least, and so does what seeing is worth."""
    out = tmp_path / "run"
    summary = check_outcome(out, run_quickstart(out, "--family", family, timeout_s=1500))
    assert summary["gains"]["accuracy"] >= 0.2
    assert summary["gains"]["gap"] > 0 and summary["gains"]["format"] > 0
