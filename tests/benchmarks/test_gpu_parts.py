"""Parts of the GPU check one by one: parts in processes of their own, budgets, counts of tests, the document."""

from __future__ import annotations

import json
import math
import os
import time
import weakref
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import command, document, fitting, fp8, memory, update
from benchmarks.gpu.apart import apart
from benchmarks.gpu.checks import counts, results
from benchmarks.gpu.command import NO_TIME, Targets, Wanted, has_failed
from benchmarks.gpu.fitting import MODES, cannot_fit, least_that_fits, needed_by_mode
from benchmarks.gpu.folder import write_published
from benchmarks.gpu.one_part import LIMIT_S, PARTS, USUAL_S, run_part
from benchmarks.gpu.rows import GIB, NEEDS_GPU, SHAPES, Failed, GpuRow, Options, attempt, reason_of
from benchmarks.gpu.smoke import FAILED_PIECES
from benchmarks.gpu.stream import Outcomes
from benchmarks.gpu.update import mfu_rows
from megatron_papo.model.published_shapes import published_config

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "benchmarks.md"
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says")


def test_a_part_that_raises_or_takes_too_long_is_a_row():
    (raised,) = run_part("nowhere", Options("tiny", True, 1))
    assert raised.note == "ModuleNotFoundError: No module named 'benchmarks.gpu.nowhere'"
    *_, late = run_part("checks", Options("tiny", True, 1), limit_s=0.01)
    assert late == GpuRow("the rest of checks", None, note="took longer than 0 s")
    assert has_failed(raised) and has_failed(late) and not has_failed(GpuRow("recompute none", None, note="no room"))


def _result_of(rows, made):
    """What `made` returns, when it has given its rows."""
    while True:
        try:
            rows.append(next(made))
        except StopIteration as end:
            return end.value


def _works_and(end: str):
    yield GpuRow("first", 1.0, "s")
    if end == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
    if end == "error":
        raise ValueError("wrong")
    if end == "death":
        os.kill(os.getpid(), 9)
    time.sleep(0.0 if end == "result" else 60.0)
    return {"tensor": torch.ones(2)}


@no_gpu
@pytest.mark.parametrize(
    ("end", "raised", "said"),
    [
        ("memory", torch.OutOfMemoryError, "out of memory"),
        ("error", Failed, "ValueError: wrong"),
        ("death", Failed, "its process was ended by SIGKILL"),
        ("late", Failed, "took longer than 1 s"),
    ],
)
def test_rows_of_another_process_stay_whatever_becomes_of_it(end, raised, said):
    rows = []
    with pytest.raises(raised, match=said):
        _result_of(rows, apart(_works_and, end, limit_s=1.0))
    assert rows == [GpuRow("first", 1.0, "s")]


@no_gpu
def test_a_result_comes_from_another_process():
    rows = []
    assert _result_of(rows, apart(_works_and, "result"))["tensor"].tolist() == [1, 1] and len(rows) == 1


def _fits_up_to(room: float, needed: dict[str, float], mode: str):
    yield GpuRow(f"tried {mode}", 1.0, "s")
    if needed[mode] > room:
        raise torch.OutOfMemoryError
    return f"with {mode}"


@no_gpu
@pytest.mark.parametrize(
    ("room", "has", "tried", "result"),
    [
        (90, 80, ["some", "out of memory", "all"], "all"),  # wrong by little: one more is computed again
        (100, 101.6, ["some", "none", "out of memory"], "some"),  # fits, and less does not
        (999, 110, ["some", "none"], "none"),  # fits, and less too
        (40, 40, ["all", "not tried"], "all"),  # nothing else can
        (999, None, ["none"], "none"),
    ],
)
def test_the_least_recomputation_is_known_beforehand_and_then_looked_for(room, has, tried, result):
    needed = {"none": 115 * GIB, "some": 95 * GIB, "all": 30 * GIB}
    room, has = room * GIB, None if has is None else int(has * GIB)
    if has == 80 * GIB:  # the arithmetic says too little
        needed, room = needed | {"some": 70 * GIB}, 60 * GIB
    rows = []
    mode, found = _result_of(rows, least_that_fits(_fits_up_to, needed, has, room, needed))
    assert (mode, found) == (result, f"with {result}")
    said = [
        row.name.removeprefix("tried ") if row.value else row.note.partition(";")[0].partition(":")[0] for row in rows
    ]
    assert said == tried


@no_gpu
def test_a_part_that_forks_others_leaves_cuda_to_them(monkeypatch):
    """As on a GPU of 80 GiB: CUDA does not survive a fork, so the part itself must not begin it."""

    def no_cuda() -> None:
        raise AssertionError("the part itself asked CUDA")

    def other_process(function, *args, **_):
        asked.append(function.__name__)
        yield from ()
        if function.__name__ == "_measure":
            return [1.0], {args[-2]: GIB}
        return SimpleNamespace(seconds={}, peaks={}, tokens=1, logprobs={}, fresh={})

    asked: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "_lazy_init", no_cuda)
    monkeypatch.setattr(fitting, "result_apart", lambda function: (0, 80 * GIB))
    for module in (fitting, fp8, memory, update):
        monkeypatch.setattr(module, "apart", other_process)
    for module, functions in (
        (update, ["_ours", "_plain"]),
        (fp8, ["_without"] + ["_one_recipe"] * len(fp8.RECIPES)),
        (memory, ["_measure"] * len(memory.SETTINGS)),
    ):
        asked.clear()
        rows = list(module.run(Options("tiny")))
        assert asked == functions and [row.note for row in rows if row.value is None] == []


def test_what_an_update_needs_is_counted_before_it_is_tried(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(published_config("Qwen2.5-VL-3B")))
    needed = needed_by_mode(tmp_path, Options("3b"))
    assert set(needed) == set(MODES) and list(needed.values()) == sorted(needed.values(), reverse=True)
    assert needed["none"] > needed["full"] > 50 * GIB
    assert "needs about" in cannot_fit(needed["none"], 80 * GIB) and not cannot_fit(needed["full"], 80 * GIB)
    assert needed["full"] - needed_by_mode(tmp_path, Options("3b"), optim__precision_aware=True)["full"] > 13 * GIB


def test_a_budget_is_shared_and_a_part_without_time_is_not_begun(tmp_path, monkeypatch, capsys):
    now, limits = [0.0], {}

    def runs(name, options, limit_s, take):
        limits[name] = limit_s
        take(GpuRow("a figure", 1.0, "s"))
        assert '"a figure"' in (tmp_path / "rows.json").read_text(), "a row is written as it comes"
        now[0] += limit_s

    monkeypatch.setattr(command, "run_part", runs)
    monkeypatch.setattr(command.time, "monotonic", lambda: now[0])
    wanted = [Wanted.parse(text) for text in ("update=100", "head=60:quick", "memory=90")]
    targets = Targets(tmp_path / "rows.json")
    assert command.run(wanted, Options("tiny"), targets, budget_s=125) == 0
    assert limits == {"update": 100, "head": 25}
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["part"], row["note"]) for row in rows] == [("update", ""), ("head", ""), ("memory", NO_TIME)]
    assert "update: a figure: 1 s" in capsys.readouterr().out
    command.run(wanted, Options("tiny"), targets, budget_s=500)
    assert limits == {"update": 200, "head": 120, "memory": 180}
    command.run(wanted[:1], Options("tiny"), targets)
    assert limits["update"] == LIMIT_S and len(json.loads((tmp_path / "rows.json").read_text())) == 3
    assert set(USUAL_S) == set(PARTS)


def test_what_was_measured_before_a_failure_stays():
    def measure():
        yield GpuRow("first", 1.0, "s")
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\nmore")

    assert list(attempt("second", measure)) == [GpuRow("first", 1.0, "s"), GpuRow("second", None, note="out of memory")]


class _Large:
    pass


def _runs_out_of_memory(held: list[weakref.ref]) -> None:
    large = _Large()
    held.append(weakref.ref(large))
    try:
        raise ValueError("a kernel that does not take this")
    except ValueError:
        raise torch.OutOfMemoryError("of what comes instead")  # noqa: B904 - as libraries do


def test_a_failure_that_is_told_holds_nothing():
    held: list[weakref.ref] = []
    try:
        _runs_out_of_memory(held)
    except torch.OutOfMemoryError as error:
        kept = error
        assert held[0]() is not None
        assert reason_of(error) == "out of memory"
    assert isinstance(kept.__context__, ValueError) and held[0]() is None


def test_results_of_tests_stay_when_the_rest_is_cut_off(tmp_path):
    file = tmp_path / "test_made_up.py"
    file.write_text(
        "import time, pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "@pytest.fixture\n"
        "def broken(): raise OSError('no such card')\n"
        "def test_broken(broken): pass\n"
        "@pytest.mark.skip(reason='needs two')\n"
        "def test_none(): pass\n"
        "def test_late(): time.sleep(600)\n"
    )
    (tmp_path / "test_not_python.py").write_text("import nothing_at_all\n")
    outcomes, rows = Outcomes(), []

    def is_over() -> bool:
        return bool(outcomes.passed and outcomes.skipped and outcomes.running)

    arguments = [str(tmp_path), "--continue-on-collection-errors", "-p", "no:randomly"]
    _result_of(rows, results(arguments, outcomes, is_over))
    names = {row.name.rpartition("/")[2].rpartition("::")[2]: row.note for row in rows}
    assert names == {
        "test_not_python.py": "failed: ModuleNotFoundError: No module named 'nothing_at_all'",
        "test_bad": "failed: assert 1 == 2",
        "test_broken": "failed: OSError: no such card",
    }
    passed, failed, skipped, longest, cut_off = counts(outcomes)
    assert (passed.value, failed.value, skipped.value) == (1, 3, 1) and longest.name.endswith("test_good")
    assert cut_off.name.endswith("test_late") and cut_off.note == "cut off: the time was over"
    assert has_failed(failed) and not has_failed(passed)
    assert next(iter(outcomes.lines())).startswith("passed 1, failed 3, skipped 1; cut off: ")


def test_pieces_that_failed_fail_the_command():
    assert has_failed(GpuRow(FAILED_PIECES, 1.0, "pieces")) and not has_failed(GpuRow(FAILED_PIECES, 0.0, "pieces"))


def test_an_update_in_fp8_is_beside_both_peaks(monkeypatch):
    monkeypatch.setattr("benchmarks.gpu.update.device_name", lambda: "NVIDIA H100 80GB HBM3")
    rows = list(mfu_rows("delayed", 1.0, int(989.5e12), fp8=True))
    assert [(row.name, row.value) for row in rows] == [
        ("delayed: MFU of bfloat16's peak / aim", 100.0), ("delayed: MFU of FP8's peak", 50.0)
    ]  # fmt: skip
    assert len(list(mfu_rows("PAPO joint", 1.0, 1))) == 1


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


@pytest.mark.parametrize("name", [SHAPES["3b"], SHAPES["4b"]])
def test_the_folder_is_the_published_model_without_its_weights(name, tmp_path):
    from transformers import AutoConfig, AutoProcessor

    from megatron_papo.generation.reference_model import expected_shapes
    from megatron_papo.model.family import family_of
    from megatron_papo.model.parameter_map import parameter_table
    from megatron_papo.model.published_shapes import published_models
    from megatron_papo.model.shape import ModelShape

    folder = write_published(tmp_path / "model", name)
    shape, tokenizer = ModelShape.from_folder(folder), AutoProcessor.from_pretrained(folder).tokenizer
    module_name = family_of(shape).module("parameters").module_name
    expected = expected_shapes(AutoConfig.from_pretrained(folder))
    sources = [source for entry in parameter_table(shape).values() for source in entry.sources]
    assert {module_name(source.name): tuple(source.shape) for source in sources} == expected
    assert sum(math.prod(size) for size in expected.values()) == published_models()[name]
    assert len(tokenizer) == 151_657 and tokenizer.convert_tokens_to_ids("<|image_pad|>") == shape.image_token_id
    assert len(tokenizer("1234567890").input_ids) == 10, "digits stay apart: a prompt has the length asked for"
