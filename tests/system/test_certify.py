"""`papo certify` and the certificates of `papo train`, as a user runs them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megatron_papo.config import dump_config
from tests.parallel.certify_cases import MODEL as MODEL  # of the inputs
from tests.support import commands
from tests.support.tiny_run import CERTIFIED, metrics, tiny_run

REPO = Path(__file__).parents[2]
TIGHT = {"certify__limits__logprobs_max": 1e-9}
"""No two programs agree so closely."""


def papo(verb: str, inputs: Path, folder: Path, ranks: int = 1, **settings: Any) -> subprocess.CompletedProcess:
    folder.mkdir(parents=True, exist_ok=True)
    settings = CERTIFIED | settings
    (folder / "config.yaml").write_text(dump_config(tiny_run(inputs, folder / "run", **settings)))
    vllm = settings.get("generation__engine") == "vllm"
    return commands.papo(verb, folder / "config.yaml", "--ranks", ranks, vllm=vllm)


def written(folder: Path, step: int) -> dict[str, Any]:
    return json.loads((folder / "run" / "certificate" / f"step_{step:08d}.json").read_text())


@pytest.mark.fast
def test_certify_prints_a_line_a_kind_of_part_and_ends_with_the_verdict(inputs, tmp_path):
    done = papo("certify", inputs, tmp_path, ranks=2, parallel__pipeline=2)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    kinds = ("token ids", "position ids", "rotary angles", "pixel values", "vision layer", "image features",
             "language layer", "log-probs")  # fmt: skip
    for kind, line in zip(kinds, lines[:8], strict=True):
        assert line.startswith(f"papo: ok   {kind}")
    page = tmp_path / "run" / "certificate" / "step_00000000.html"
    assert lines[8:] == [
        f"papo: certificate: {page}",
        "papo: certificate: Hugging Face, trainer and engine agree on 12 parts",
    ]
    assert page.read_text().startswith("<!doctype html>")
    tree = written(tmp_path, 0)
    assert tree["passed"] and tree["sides"]["huggingface_weights"] == "model.path"
    assert tree["sides"]["precisions"]["Hugging Face"] == "float32"
    (first, second) = tree["responses"]
    assert first["prompt_id"] == "train:0" and second["prompt_id"] == "train:1"
    assert len(first["tokens"]) == len(first["logprobs"]["trainer"]) == len(first["logprobs"]["Hugging Face"])


def test_certify_exits_with_1_and_the_part_that_departs(inputs, tmp_path):
    done = papo("certify", inputs, tmp_path, **TIGHT)
    assert done.returncode == 1
    assert "papo: FAIL log-probs: " in done.stdout
    last = done.stderr.splitlines()[-1]
    assert last.startswith("papo: rank 0 failed: RunStopped: certificate: log-probs: trainer departs from Hugging Face")
    assert last.endswith(" nats at most (limit 1e-09)")


def test_random_weights_are_the_trainers(inputs, tmp_path):
    done = papo("certify", inputs, tmp_path, model__random_init=True)
    assert done.returncode == 0, done.stderr
    assert written(tmp_path, 0)["sides"]["huggingface_weights"] == "the trainer's"


def test_a_run_records_its_certificates_and_computes_the_same_with_and_without(inputs, tmp_path):
    done = papo("train", inputs, tmp_path / "with", train__steps=4)
    assert done.returncode == 0, done.stderr
    off = {"certify__at_start": False, "certify__after_hand_over": False}
    without = papo("train", inputs, tmp_path / "without", train__steps=4, **off)
    assert without.returncode == 0, without.stderr
    assert metrics(tmp_path / "with" / "run") == metrics(tmp_path / "without" / "run")
    assert not (tmp_path / "without" / "run" / "certificate").exists()
    steps = [path.stem for path in sorted((tmp_path / "with" / "run" / "certificate").glob("*.json"))]
    assert steps == ["step_00000000", "step_00000003", "step_00000004"]
    lines = [json.loads(line) for line in (tmp_path / "with" / "run" / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert 0 < line["certify/logprobs_mean"] <= line["certify/logprobs_max"] < 1e-3 and line["time/certify"] > 0


def test_a_run_does_not_start_beyond_a_limit(inputs, tmp_path):
    done = papo("train", inputs, tmp_path, **TIGHT)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("papo: rank 0 failed: RunStopped: certificate: log-probs: ")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_run_stops_beyond_a_limit_after_a_hand_over_and_can_go_on(inputs, tmp_path):
    done = papo("train", inputs, tmp_path, ranks=2, certify__at_start=False, **TIGHT)
    assert done.returncode == 1
    reason = done.stderr.splitlines()[-1]
    assert "failed: RunStopped: stopped the run after step 0: certificate: log-probs: engine departs from" in reason
    assert not written(tmp_path, 1)["passed"]
    again = papo("train", inputs, tmp_path, ranks=2)
    assert again.returncode == 0, again.stderr
    tree = written(tmp_path, 1)  # of the resumed run's start, with Hugging Face
    assert tree["passed"] and tree["at_start"] and tree["sides"]["huggingface_weights"] == "the trainer's"
    assert {"Hugging Face"} < {finding["other"] for finding in tree["findings"]}
