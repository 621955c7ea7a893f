"""The GPU check as a user runs it, on whatever this machine has: every part runs, what needs a GPU says so, and the
section of docs/benchmarks.md is rewritten part by part. Asserts no speed."""

from __future__ import annotations

import json
import math
import subprocess
import xml.etree.ElementTree as ElementTree
from datetime import date
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.commands import run
from tools.benchmarks.gpu import document
from tools.benchmarks.gpu.checks import rows_of
from tools.benchmarks.gpu.command import has_failed
from tools.benchmarks.gpu.folder import write_3b
from tools.benchmarks.gpu.one_part import PARTS, run_part
from tools.benchmarks.gpu.rows import NEEDS_GPU, GpuRow, Options, attempt

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
    for name in PARTS:
        assert f"gpu, {name} (quick)" in done.stdout
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
    agreement, *timed = rows["update"]
    assert agreement["value"] < agreement["baseline"] == 1e-4 and agreement["unit"] == "nats"
    assert [row["unit"] for row in timed] == ["tokens/s", "", ""] * 2
    assert all(row["note"] == NEEDS_GPU for row in timed if not row["unit"])
    assert [row["name"][:11] for row in timed] == ["PAPO frozen"] * 3 + ["PAPO joint,"] * 3


@no_gpu
def test_every_recipe_setting_and_baseline_has_its_row(rows):
    for recipe in ("tensorwise", "delayed", "blockwise"):
        gap, *timed = [row for row in rows["fp8"] if row["name"].startswith(recipe)]
        assert 0 < gap["value"] < gap["baseline"] == 0.1 and gap["unit"] == "nats"  # emulated without a GPU
        assert [row["unit"] for row in timed] == ["tokens/s", "", ""] * 2
    assert [row["unit"] for row in rows["memory"] if row["value"]] == ["tokens/s"] * 3  # by what is computed again
    refused = [row for row in rows["memory"] if "need a GPU" in row["note"]]
    assert [row["name"].rpartition(", ")[2] for row in refused] == [
        "moments in bfloat16", "moments in bfloat16", "half of the states on the host"
    ]  # fmt: skip
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
    rate, cached = rows["rollouts"]
    assert rate["unit"] == "tokens/s" and cached["baseline"] == 0
    assert cached["value"] == pytest.approx(7 / 8 * 256 / 300, abs=1e-6)  # two whole blocks of the prompt's 300 tokens
    *buckets, sleep = rows["handover"]
    assert [row["unit"] for row in buckets] == ["s", "GB/s"] * 2 and sleep["note"] == NEEDS_GPU
    for seconds, rate in zip(buckets[::2], buckets[1::2]):
        gigabytes = float(seconds["name"].removeprefix("hand-over of ").partition(" GB")[0])
        assert seconds["value"] * rate["value"] == pytest.approx(gigabytes, abs=0.005)


@no_gpu
def test_without_a_gpu_nothing_is_written_into_the_document(tmp_path):
    before = DOCUMENT.read_text()
    for arguments, reason in (
        (("--write",), "--write needs a GPU"),
        (("--shape", "3b"), "--shape 3b needs a GPU"),
        (("--part", "heads"), "--part heads: there are checks, update"),
    ):
        done = _run(tmp_path, "--quick", *arguments)
        assert done.returncode == 2 and reason in done.stderr
    assert DOCUMENT.read_text() == before
    if not any(Path(device).exists() for device in ("/dev/nvidia0", "/dev/dxg")):
        made = subprocess.run(["make", "gpu-check"], cwd=ROOT, capture_output=True, text=True)
        assert made.returncode == 2 and "make gpu-check: no GPU on this machine" in made.stderr


def test_a_part_that_raises_dies_or_takes_too_long_is_a_row():
    (raised,) = run_part("nowhere", Options("tiny", True, 1))
    assert raised.note == "ModuleNotFoundError: No module named 'tools.benchmarks.gpu.nowhere'"
    *_, late = run_part("checks", Options("tiny", True, 1), limit_s=0.01)
    assert late == GpuRow("the rest of checks", None, note="took longer than 0 s")
    assert has_failed(raised) and has_failed(late) and not has_failed(GpuRow("recompute none", None, note="no room"))


def test_what_was_measured_before_a_failure_stays():
    def measure():
        yield GpuRow("first", 1.0, "s")
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\nmore")

    assert list(attempt("second", measure)) == [GpuRow("first", 1.0, "s"), GpuRow("second", None, note="out of memory")]


def test_failed_gpu_tests_are_rows_and_fail_the_command():
    report = ElementTree.fromstring(
        "<testsuites><testsuite><testcase classname='a' name='good'/>"
        "<testcase classname='a' name='bad'><failure message='assert 2 &lt; 1&#10;more'/></testcase>"
        "<testcase classname='a' name='broken'><error message=''/></testcase>"
        "<testcase classname='a' name='none'><skipped message='needs'/></testcase></testsuite></testsuites>"
    )
    rows = list(rows_of(report))
    assert [row.value for row in rows[:3]] == [1, 2, 1] and [has_failed(row) for row in rows[:3]] == [
        False,
        True,
        False,
    ]
    assert [(row.name, row.note) for row in rows[3:]] == [
        ("a::bad", "failure: assert 2 < 1"), ("a::broken", "error: no message")
    ]  # fmt: skip


def test_the_document_is_rewritten_part_by_part(tmp_path):
    file = tmp_path / "benchmarks.md"
    file.write_text(f"before\n\n{document.section({})}\n\nafter\n")
    made = {part: document.Made(f"run {part}", "a card; torch 2", date(2030, 1, 2)) for part in PARTS}
    document.write(file, {"head": [GpuRow("a | b", 1234.56, "ms", 2.0, 617.28)]}, made)
    document.write(file, {"update": [GpuRow("MFU", None, note=NEEDS_GPU)]}, made)
    text = file.read_text()
    assert text.startswith("before\n\n<!-- gpu-check -->") and text.endswith("<!-- /gpu-check -->\n\nafter\n")
    parts = document.parts_of(text)
    assert list(parts) == list(PARTS)
    assert parts["head"].splitlines()[0] == "`run head`, 2030-01-02, a card; torch 2."
    assert parts["head"].splitlines()[-1] == "| a \\| b | 1,235 | 2 | 617.3 | ms |"
    assert parts["update"].splitlines()[-1] == f"| MFU | – | – | – | {NEEDS_GPU} |"
    assert {text for name, text in parts.items() if name not in ("head", "update")} == {document.NOT_RUN}
    assert document.merged(text, {}) == text
    with pytest.raises(ValueError, match="no section between"):
        document.merged("nothing", {})


def test_the_committed_section_has_every_part_and_no_figure_of_a_machine_without_a_gpu():
    text = DOCUMENT.read_text()
    assert document.merged(text, {}) == text, "the section is as the tool writes it"
    for part, found in document.parts_of(text).items():
        assert found == document.NOT_RUN or (f"gpu --part {part}" in found and "no GPU" not in found.splitlines()[0])


def test_the_3b_folder_is_the_published_model_without_its_weights(tmp_path):
    from transformers import AutoProcessor, Qwen2_5_VLConfig

    from megatron_papo.checkpoint.names import module_name, parameter_table
    from megatron_papo.generation.handover import expected_shapes
    from megatron_papo.model.shape import ModelShape
    from tools.benchmarks.published import NUM_PARAMETERS

    folder = write_3b(tmp_path / "model")
    shape, tokenizer = ModelShape.from_folder(folder), AutoProcessor.from_pretrained(folder).tokenizer
    expected = expected_shapes(Qwen2_5_VLConfig.from_pretrained(folder))
    sources = [source for entry in parameter_table(shape).values() for source in entry.sources]
    assert {module_name(source.name): tuple(source.shape) for source in sources} == expected
    assert sum(math.prod(size) for size in expected.values()) == NUM_PARAMETERS["3B"]
    assert len(tokenizer) == 151_657 and tokenizer.convert_tokens_to_ids("<|image_pad|>") == shape.image_token_id
    assert len(tokenizer("1234567890").input_ids) == 10, "digits stay apart: a prompt has the length asked for"
