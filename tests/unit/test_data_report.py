"""`papo data`: the same rows are bad as for the trainer, tokens are counted without pixels, the page is harmless."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from megatron_papo import cli
from megatron_papo.config import Config, DataConfig, load_config
from megatron_papo.data import Masks, PromptDataset
from megatron_papo.data.bad_rows import BadRow
from megatron_papo.data.processor import ImageTooExtreme, Processor
from megatron_papo.data.processor_files import read_processor
from megatron_papo.data_report.examples import examples_of
from megatron_papo.data_report.histogram import histogram
from megatron_papo.data_report.measuring import MeasuringProcessor
from megatron_papo.data_report.reading import open_rows, read_rows
from tests.support.tiny import make_tiny_folder

DATA = DataConfig(min_pixels=28 * 28, max_pixels=112 * 112, instruction="", max_prompt_tokens=80)
SIZES = ((56, 56), (84, 28), (31, 77), (300, 200), (10, 1999), (5, 5), (28, 2800))
HOSTILE = "<script>alert(1)</script>\x1b[31m"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.RandomState(0).randint(0, 256, (height, width, 3)).astype(np.uint8))


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    picture(width, height).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def rows(tmp_path) -> Path:
    """Seven good rows, the last of them a repetition, and one of each of four kinds of bad ones, from row 7 on."""
    (tmp_path / "a.png").write_bytes(png(56, 84))
    good = [
        {"problem": f"{HOSTILE} {number}", "answer": str(number), "images": ["a.png"], "response": "so: 4"}
        for number in range(6)
    ]
    good += [good[0]]
    bad = [
        {**good[0], "images": ["gone.png"]},
        {**good[0], "problem": "<image><image>two"},
        {**good[0], "answer": ""},
        {**good[0], "problem": "long" * 40},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*good, *bad]))
    return path


def settings(folder: Path, rows: Path, *more: str) -> list[str]:
    bounds = ["data.min_pixels=784", "data.max_pixels=12544", "data.instruction=", "data.max_prompt_tokens=80"]
    return [f"model.path={folder}", f"data.train={rows}", f"run.dir={rows.parent}/run", *bounds, *more]


def config_of(folder: Path, rows: Path, *more: str) -> Config:
    return load_config(None, settings(folder, rows, *more))


def test_tokens_are_counted_without_pixels_as_the_processor_counts_them(folder):
    files = read_processor(folder)
    real, measuring = Processor(files, folder, DATA), MeasuringProcessor(files, folder, DATA)
    for size in SIZES[:-2]:
        _, grid = real.pixel_values([picture(*size)])
        pixels, measured = measuring.pixel_values([picture(*size)])
        assert not pixels.numel() and torch.equal(real.num_tokens(grid), measuring.num_tokens(measured)), size
    with pytest.raises(ImageTooExtreme):
        measuring.pixel_values([picture(5, 1001)])


def test_the_same_rows_are_bad_as_for_the_trainer(folder, rows):
    config = config_of(folder, rows)
    opened = open_rows(config, "train", folder)
    survey = read_rows(opened, None)
    dataset = PromptDataset(config.data, "train", opened.processor)
    expected: dict[int, object] = {}
    for row in range(len(dataset)):
        try:
            expected[row] = dataset.prompt(row, Masks(config.perception.mask, 0)).inputs.token_ids_S.numel()
        except BadRow as bad:
            expected[row] = str(bad)
    found = {row.row: row.num_tokens for row in survey.good} | {bad.row: str(bad) for bad in survey.bad}
    assert found == expected and len(survey.good) == 7
    assert [(reason, number) for reason, number, _ in survey.reasons] == [
        ("image file missing", 1), ("placeholder count", 1), ("no answer", 1), ("prompt too long", 1),
    ]  # fmt: skip
    assert survey.num_repeated == 1 and set(survey.pixels) == {56 * 84} == set(survey.seen_pixels)
    assert [row.row for row in read_rows(opened, 4).good] == [0, 2, 5], "spread over the rows; row 8 is bad"


def test_rows_are_counted_by_source(folder, rows):
    entry = f"{{path: {rows}, name: left}}"
    config = config_of(folder, rows, f"data.train=[{entry}, {{path: {rows}, name: right, filter: {{answer: [1, 2]}}}}]")
    opened = open_rows(config, "train", folder)
    survey = read_rows(opened, None)
    assert survey.sources == [("left", 7, 4), ("right", 2, 0)]
    shown = [(example.measured.source, example.number) for example in examples_of(opened, survey)]
    assert shown == [("left", 0), ("right", 1)], "the number in the file"


def test_demonstrations_are_measured(folder, rows):
    config = config_of(folder, rows)
    survey = read_rows(open_rows(config, "sft", folder), None)
    assert survey.figures["tokens of a demonstration"] == [len("so: 4") + 1] * 8, "the row without an answer too"


def test_the_command_prints_a_table_and_writes_a_page(folder, rows, capsys):
    assert cli.main(["data", *settings(folder, rows)]) == 0
    out, page = capsys.readouterr().out, (rows.parent / "run/data.html").read_text()
    assert "all 11 rows read, 7 good, 4 bad" in out and "\x1b[31m" not in out
    assert "data.on_bad_row=stop: the run would stop at the first bad row that it draws. There are 4 bad rows" in out
    assert "row 7: image file missing" in out and "placeholder count" in out
    for text in ("row 7: image file missing", "image_pad", "&lt;script&gt;", "as the model sees it", "masked", "<svg"):
        assert text in page, text
    assert "<script" not in page and "http://" not in page and "\x1b" not in page
    assert page.count("data:image/png;base64,") == 2


def test_the_exit_code_tells_wrong_settings_from_data_without_a_good_row(folder, rows, capsys):
    bad = rows.with_name("bad.jsonl")
    bad.write_text(json.dumps({"problem": "how many?", "answer": "", "images": []}) + "\n")
    assert cli.main(["data", "--eval", *settings(folder, rows, f"data.eval={bad}", "data.on_bad_row=skip")]) == 1
    told = capsys.readouterr()
    assert "no answer" in told.out and "1 row would be left out" in told.out
    assert "data.eval: no row can be a prompt" in told.err
    for words, said in (
        (["--limit", "0"], "--limit: 0 is no number of rows"),
        (["--out", str(rows.parent)], "is a folder"),
        (["--eval"], "data.eval: papo eval needs it"),
        (["data.columns.problem=question"], "data.columns.problem"),
    ):
        assert cli.main(["data", *settings(folder, rows), *words]) == 2
        assert said in capsys.readouterr().err


def test_what_no_verb_would_take_is_refused_here_too(folder, rows, tmp_path, capsys):
    for file, key, value in (
        ("config.json", "model_type", "llava"),
        ("processor_config.json", "processor_class", "Qwen3VLProcessor"),
    ):
        other = tmp_path / key
        shutil.copytree(folder, other)
        (other / file).write_text(json.dumps(json.loads((folder / file).read_text()) | {key: value}))
        assert cli.main(["data", *settings(other, rows)]) == 2
        assert f"model.path: {other / file}: {key}: is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "bars"), [([3], 1), ([1, 1, 4], 2), ([1, 2, 10**7], 3), ([0, 10**7], 2), (range(1000), 32)]
)
def test_bars_hold_every_value(values, bars):
    assert histogram(list(values)).count("<rect") == bars
