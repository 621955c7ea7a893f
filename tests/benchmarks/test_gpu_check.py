"""The GPU check as a user runs it, on whatever this machine has: every part runs, what needs a GPU says so, and the
section of docs/benchmarks.md is rewritten part by part. Asserts no speed."""

from __future__ import annotations

import json
import math
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.one_part import PARTS
from benchmarks.gpu.rows import NEEDS_GPU
from tests.support.commands import run

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "benchmarks.md"
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says")


def _run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    vllm = find_spec("vllm") is not None
    return run(ROOT / "tools" / "benchmark.py", "gpu", *arguments, cwd=folder, timeout=570, vllm=vllm)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[str, list[dict]]:
    """By part, of one quick run at the tiny shape."""
    folder = tmp_path_factory.mktemp("gpu")
    done = _run(folder, "--quick", "--shape", "tiny", "--json", "rows.json")
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    found: dict[str, list[dict]] = {}
    for row in json.loads((folder / "rows.json").read_text()):
        found.setdefault(row.pop("part"), []).append(row)
    at = [(done.stdout.index(f"\n{name}: "), done.stdout.index(f"gpu, {name} (quick)")) for name in list(PARTS)[1:]]
    assert all(first < table for first, table in at) and at == sorted(at), "rows come before the table of their part"
    return found


@no_gpu
def test_every_part_ran_and_no_row_is_without_figure_and_reason(rows):
    assert list(rows) == list(PARTS)
    for part, found in rows.items():
        for row in found:
            assert set(row) == {"name", "value", "unit", "baseline", "ratio", "note"}
            assert (row["value"] is None) == bool(row["note"]), (part, row)
            if row["value"] is not None:
                assert row["unit"] and math.isfinite(row["value"]), (part, row)
            if row["ratio"] is not None and row["unit"] not in ("tests",):  # one round: no medians to tell apart
                assert row["ratio"] == pytest.approx(row["value"] / row["baseline"], rel=1e-6), (part, row)
        measured = [row for row in found if row["value"] is not None]
        assert measured, f"{part} measured nothing: {found}"


@no_gpu
def test_the_update_is_that_of_transformers_and_says_what_a_gpu_would_add(rows):
    ours, agreement, *beside = rows["update"][:5], *rows["update"][5:]
    assert [row["unit"] for row in ours] == ["tokens/s", ""] * 2 + [""]
    assert all(row["note"] == NEEDS_GPU for row in ours if not row["unit"])
    assert [row["name"][:11] for row in ours] == ["PAPO frozen"] * 2 + ["PAPO joint,"] * 3
    assert agreement["value"] < agreement["baseline"] == 1e-4 and agreement["unit"] == "nats"
    assert [row["unit"] for row in beside] == ["tokens/s"] * 2
    assert [row["value"] for row in beside] == [row["value"] for row in ours if row["unit"]]


@no_gpu
def test_every_recipe_setting_and_baseline_has_its_row(rows):
    for recipe in ("tensorwise", "delayed", "blockwise"):
        gap, *timed = [row for row in rows["fp8"] if row["name"].startswith(recipe)]
        assert 0 < gap["value"] < gap["baseline"] == 0.1 and gap["unit"] == "nats"  # emulated without a GPU
        assert [row["unit"] for row in timed] == ["tokens/s", "", ""] * 2
    measured = [row for row in rows["memory"] if row["value"]]
    assert [row["unit"] for row in measured] == ["tokens/s"] * 3  # two alone, and one beside the other
    refused = [row["name"].rpartition(", ")[2] for row in rows["memory"] if row["note"] and "peak" not in row["name"]]
    assert sorted(refused) == ["half of the states on the host", "moments in bfloat16"]
    assert [row["unit"] for row in rows["head"] if row["value"]] == ["ms", "ms"]
    assert "peak memory" in rows["head"][2]["name"] and rows["head"][2]["note"] == NEEDS_GPU
    for baseline in ("dense mask", "prompts repeated"):
        assert [row["unit"] for row in rows["attention"] if row["name"].endswith(f"backward, ours / {baseline}")] == [
            "ms", "TFLOP/s"
        ]  # fmt: skip
    assert any("FlexAttention" in row["name"] and "backward on CPU" in row["note"] for row in rows["attention"])


@no_gpu
def test_the_tests_of_the_gpu_are_counted(rows):
    passed, failed, skipped = rows["checks"]
    assert (passed["value"], failed["value"]) == (0, 0) and skipped["value"] >= 10


@no_gpu
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_the_engine_reads_a_prompt_once_a_group_and_sleeps_on_a_gpu(rows):
    alone, share, rate, cached = rows["rollouts"]
    assert alone["unit"] == rate["unit"] == "tokens/s" and alone["value"] == rate["value"]
    assert cached["baseline"] == 0 and share["value"] == cached["value"]
    assert cached["value"] == pytest.approx(7 / 8 * 256 / 300, abs=1e-6)  # two whole blocks of the prompt's 300 tokens
    *buckets, sleep = rows["handover"]
    assert [row["unit"] for row in buckets] == ["s", "GB/s"] * 2 and sleep["note"] == NEEDS_GPU
    for seconds, rate in zip(buckets[::2], buckets[1::2]):
        gigabytes = float(seconds["name"].removeprefix("hand-over of ").partition(" GB")[0])
        assert seconds["value"] * rate["value"] == pytest.approx(gigabytes, abs=0.005)


@no_gpu
@pytest.mark.slow
def test_an_update_of_qwen3_vl_is_that_of_transformers_too(tmp_path):
    done = _run(tmp_path, "--quick", "--shape", "tiny-qwen3", "--part", "update", "--json", "rows.json")
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert rows["log-probs, ours against transformers: mean gap / allowed"]["ratio"] < 1
    assert sum(row["unit"] == "tokens/s" and row["baseline"] is not None for row in rows.values()) == 2


@no_gpu
def test_without_a_gpu_nothing_is_written_into_the_document(tmp_path):
    before = DOCUMENT.read_text()
    for arguments, reason in (
        (("--write",), "--write needs a GPU"),
        (("--shape", "4b"), "--shape 4b needs a GPU"),
        (("--shape", "5b"), "--shape 5b: there are 3b, 4b, tiny"),
        (("--part", "heads"), "--part heads: there are smoke, checks"),
        (("--part", "head:slow"), "--part head:slow: behind the colon there can be quick"),
        (("--recompute", "all"), "--recompute all: there are none, "),
    ):
        done = _run(tmp_path, "--quick", *arguments)
        assert done.returncode == 2 and reason in done.stderr
    assert DOCUMENT.read_text() == before
    if not any(Path(device).exists() for device in ("/dev/nvidia0", "/dev/dxg")):
        made = subprocess.run(["make", "gpu-check"], cwd=ROOT, capture_output=True, text=True)
        assert made.returncode == 2 and "make gpu-check: no GPU on this machine" in made.stderr
