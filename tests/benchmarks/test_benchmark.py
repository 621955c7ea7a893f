"""The benchmark as a user runs it, cut short: which rows there are, and that they are consistent. Asserts no speed."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.commands import run

ROOT = Path(__file__).parents[2]
needs_trl = pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed; `make bench` installs it")


def run_benchmark(which: str, folder: Path, *arguments: str) -> list[dict]:
    """The rows that `tools/benchmark.py WHICH --quick` wrote."""
    out = folder / "rows.json"
    done = run(ROOT / "tools" / "benchmark.py", which, "--quick", "--json", out, *arguments, cwd=folder)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    rows = json.loads(out.read_text())
    assert all(set(row) == {"name", "value", "baseline", "ratio", "unit"} for row in rows)
    assert f"{which} (quick)" in done.stdout
    return rows


def check_ratio(row: dict) -> None:
    """One round: the median of the ratios is the ratio of the medians."""
    assert row["value"] >= 0 and row["baseline"] > 0 and math.isfinite(row["value"])
    assert row["ratio"] == pytest.approx(row["value"] / row["baseline"], rel=1e-6)


@needs_trl
def test_update(tmp_path):
    rows = run_benchmark("update", tmp_path)
    for row in rows:
        check_ratio(row)
    agreement = [row for row in rows if row["name"].startswith("agreement: ")]
    assert len(agreement) == 2 + 2 * 4  # log-probs; losses and gradients of three kinds against plain, GRPO also TRL
    assert all(row["value"] < row["baseline"] == 1e-4 and row["unit"] in ("nats", "relative") for row in agreement)
    floors = [row for row in rows if row["name"].endswith("at the speed of a product")]
    assert [row["unit"] for row in floors] == ["s"] * 3
    grpo, frozen, joint = (row["baseline"] for row in floors)
    assert (frozen / grpo, joint / grpo) == (pytest.approx(4 / 3), pytest.approx(2))
    timed = [row for row in rows if row not in agreement + floors]
    assert [row["unit"] for row in timed] == ["tokens/s", "s"] * 5
    names = [row["name"] for row in timed[::2]]
    assert names == [row["name"] for row in timed[1::2]]
    kinds = ["GRPO / TRL", "PAPO frozen / TRL", "PAPO joint / TRL", "PAPO frozen / plain", "PAPO joint / plain"]
    assert all(name.startswith(f"96 + 16 tokens: {kind}") for name, kind in zip(names, kinds, strict=True))
    for speed, seconds in zip(timed[::2], timed[1::2]):  # 2 prompts x 4 rollouts x 112 tokens, on every side
        for side in ("value", "baseline"):
            assert speed[side] * seconds[side] == pytest.approx(2 * 4 * (96 + 16))


@needs_trl
def test_step(tmp_path):
    rows = run_benchmark("step", tmp_path)
    for row in rows:
        check_ratio(row)
    assert [row["unit"] for row in rows] == ["tokens/s", "s"] * 3 + ["s", "s", "tokens", "s", "s"]
    lengths = rows[-3]
    assert lengths["value"] == pytest.approx(16, rel=0.1) and lengths["baseline"] == pytest.approx(16, rel=0.1)


def test_head(tmp_path):
    rows = run_benchmark("head", tmp_path)
    for row in rows:
        check_ratio(row)
    assert [row["unit"] for row in rows] == ["MiB", "MiB", "s", "MiB", "s", "s"]
    assert [row["name"].rpartition(" / ")[2] for row in rows[1:]] == ["naive"] * 2 + ["checkpointed"] * 2 + ["matmuls"]


@pytest.mark.slow
def test_families(tmp_path):
    rows = run_benchmark("families", tmp_path)
    agreement = [row for row in rows if "agreement" in row["name"]]
    assert len(agreement) == 2 * 7 and all(row["ratio"] < 1 for row in agreement)
    assert [row["unit"] for row in rows if row not in agreement] == ["tokens/s", "s"] * 3


def test_growth(tmp_path):
    rows = run_benchmark("growth", tmp_path, "--plot", str(tmp_path / "growth.png"))
    for row in rows:
        check_ratio(row)
    assert [row["unit"] for row in rows] == ["s"] * 8
    assert [row["ratio"] for row in rows[::2]] == pytest.approx(
        [1.0] * 4
    )  # the smallest point is where each line begins
    for first, second in zip(rows[::2], rows[1::2]):
        assert second["baseline"] > first["baseline"]
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_handover(tmp_path):
    rows = run_benchmark("handover", tmp_path)
    assert [row["name"].partition(":")[0] for row in rows] == ["TP 2"] * 3 + ["PP 2"] * 3
    for row in rows:
        assert row["unit"] == "GB/s" and row["ratio"] == pytest.approx(row["value"] / row["baseline"])  # one round


@pytest.mark.slow
def test_plan(tmp_path):
    *rows, order = run_benchmark("plan", tmp_path)
    assert [row["name"].partition(":")[0] for row in rows] == ["1 rank", "TP 2", "TP 2 with SP", "PP 2", "DP 2"]
    assert rows[0]["ratio"] == pytest.approx(1, rel=0.5), "fitted to this run"
    assert order["unit"] == "pairs" and order["baseline"] == 10 and 0 <= order["value"] <= 10


def test_save(tmp_path):
    rows = run_benchmark("save", tmp_path)
    assert len(rows) == 2 * 10
    for ranks, found in (("1 rank: ", rows[:10]), ("2 ranks: ", rows[10:])):
        assert all(row["name"].startswith(ranks) for row in found)
        assert [row["unit"] for row in found] == ["s", "GB/s", *["s"] * 8]
        for row in (found[0], found[2], found[3], found[5], found[6], *found[8:]):
            check_ratio(row)
        for clock, share in ((found[2], found[4]), (found[5], found[7])):  # one round: the median is the difference
            assert share["value"] - share["baseline"] == pytest.approx(clock["value"] - clock["baseline"], abs=1e-6)
            assert share["baseline"] == 60 and share["ratio"] == pytest.approx(share["value"] / 60)
        megabytes = float(found[0]["name"].partition("a save of ")[2].partition(" MB")[0])
        assert found[1]["value"] * found[0]["value"] * 1e3 == pytest.approx(megabytes, abs=0.5)


def test_convert(tmp_path):
    rows = run_benchmark("convert", tmp_path, "--folder", str(tmp_path))
    assert [row["unit"] for row in rows] == ["GB/s", "GiB", "GiB"] * 8 + ["s", "s", "GB/s"] * 4
    for row in rows[:24]:
        check_ratio(row)
    for rate, resident, anonymous in zip(rows[:24:3], rows[1:24:3], rows[2:24:3]):
        assert 0 < anonymous["value"] < resident["value"] < 2.0, rate["name"]
    assert [file.name for file in tmp_path.iterdir()] == ["rows.json"], "what was written is gone"


def test_fp8(tmp_path):
    rows = run_benchmark("fp8", tmp_path)
    # bfloat16; by recipe all layers, one less at either end, and each of 4 x 4 linears; a mean and a maximum each
    assert len(rows) == 2 * (1 + 4 * (2 + 16))
    for row in rows:
        check_ratio(row)
    assert all(mean["value"] < most["value"] for mean, most in zip(rows[::2], rows[1::2]))
    for recipe in ("tensorwise", "delayed", "blockwise", "mxfp8"):
        own = [row["value"] for row in rows[::2] if row["name"].startswith(recipe)]
        assert own[0] > rows[0]["value"] > 0  # 3 bits of mantissa against 7
        assert own[2:] == sorted(own[2:], reverse=True)
        assert own[2] < own[0] < sum(own[2:])  # one linear does less than all, all less than their sum


@needs_trl
@pytest.mark.parametrize("gap", [2e-4, math.nan])
def test_sides_that_differ_are_refused(gap):
    from benchmarks.agreement import SidesDiffer, checked

    with pytest.raises(SidesDiffer, match=r"loss: .*allowed 1e-04"):
        checked("loss", gap, "nats")
    assert checked("loss", 5e-5, "nats").ratio == 0.5


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_ahead(tmp_path):
    rows = run_benchmark("ahead", tmp_path)
    assert [row["unit"] for row in rows] == ["s", "s", "s", "share"]
    for row in rows:
        check_ratio(row)
    assert rows[1]["value"] < rows[0]["value"] and rows[3]["value"] <= 1
