"""Rows of every kind of source as prompts; what makes a row bad; skipping and stopping alike on every rank."""

import base64
import io
import json
import pathlib
import re

import datasets
import numpy as np
import pytest
from PIL import Image

from megatron_papo.config import ColumnsConfig, DataConfig, load_config
from megatron_papo.data import BadRow, BadRows, DataCursor, PromptDataset, draw_prompts, load_processor, prompts_of
from megatron_papo.data.settings_order import first_cursor
from megatron_papo.parity.chosen_prompts import prompts_to_certify
from tests.support.tiny import make_tiny_folder

DATA = DataConfig(min_pixels=28 * 28, max_pixels=112 * 112, instruction="", max_prompt_tokens=80)


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return load_processor(make_tiny_folder(tmp_path_factory.mktemp("model")), DATA)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def picture(seed=0, width=56, height=56):
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8))


def png(seed=0, **size):
    buffer = io.BytesIO()
    picture(seed, **size).save(buffer, format="PNG")
    return buffer.getvalue()


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def open_train(processor, name, **settings):
    return PromptDataset(DATA.model_copy(update={"train": str(name), **settings}), "train", processor)


def check_two_rows(dataset):
    assert len(dataset) == 2
    first, second = dataset.prompt(0), dataset.prompt(1)
    assert (first.id, first.row, first.problem, first.answer) == ("train:0", 0, "<image>How many?", "3")
    assert first.images == (png(0),) and second.images == (png(1),)
    assert first.inputs.pixel_values_PD.shape == (16, 1176) and second.answer == "4"


def rows_of(cells):
    return {"problem": ["<image>How many?", "<image>And now?"], "answer": ["3", "4"], "images": cells}


def test_json_lines_with_paths_beside_the_file(processor, tmp_path):
    (tmp_path / "pictures").mkdir()
    for seed in (0, 1):
        (tmp_path / "pictures" / f"{seed}.png").write_bytes(png(seed))
    rows = [
        {"problem": "<image>How many?", "answer": "3", "images": ["pictures/0.png"], "response": "\\boxed{3}"},
        {"problem": "<image>And now?", "answer": "4", "images": ["pictures/1.png"], "response": "\\boxed{4}"},
    ]
    dataset = open_train(processor, write_lines(tmp_path / "train.jsonl", rows))
    check_two_rows(dataset)
    assert dataset.column(1, "response") == "\\boxed{4}" and dataset.images(1) == (png(1),)
    with pytest.raises(ValueError, match="no column 'reply', has problem, answer, images, response"):
        dataset.column(0, "reply")


def test_parquet_with_bytes_in_dicts_and_numbers_as_answers(processor, tmp_path):
    cells = [[{"bytes": png(seed), "path": None}] for seed in (0, 1)]
    table = datasets.Dataset.from_dict({**rows_of(cells), "answer": [3, 4]})
    table.to_parquet(tmp_path / "train.parquet")
    check_two_rows(open_train(processor, tmp_path / "train.parquet"))


def test_parquet_with_the_image_feature_and_another_split_name(processor, tmp_path):
    features = datasets.Features(
        problem=datasets.Value("string"), answer=datasets.Value("string"), images=datasets.List(datasets.Image())
    )
    datasets.Dataset.from_dict(rows_of([[png(0)], [png(1)]]), features=features).to_parquet(tmp_path / "x.parquet")
    check_two_rows(open_train(processor, tmp_path / "x.parquet", split="validation"))


def test_one_picture_a_row_not_in_a_list_and_bytes(processor, tmp_path):
    datasets.Dataset.from_dict(rows_of([png(0), png(1)])).to_parquet(tmp_path / "train.parquet")
    check_two_rows(open_train(processor, tmp_path / "train.parquet"))


def test_folder_saved_by_datasets_from_pil_pictures(processor, tmp_path):
    saved = datasets.Dataset.from_dict(rows_of([picture(0), picture(1)]))
    datasets.DatasetDict(train=saved).save_to_disk(tmp_path / "saved")
    dataset = open_train(processor, tmp_path / "saved")
    assert [dataset.prompt(row).inputs.pixel_values_PD.shape for row in (0, 1)] == [(16, 1176)] * 2
    with pytest.raises(ValueError, match=r"data.train: cannot read .*saved \(split test\): no split test, has train"):
        open_train(processor, tmp_path / "saved", split="test")


def test_image_folder(processor, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed in (0, 1):
        (folder / f"{seed}.png").write_bytes(png(seed))
    rows = rows_of(["0.png", "1.png"])
    lines = [
        {"file_name": name, "problem": problem, "answer": answer}
        for problem, answer, name in zip(rows["problem"], rows["answer"], rows["images"])
    ]
    write_lines(folder / "metadata.jsonl", lines)
    check_two_rows(open_train(processor, folder, columns=ColumnsConfig(images="image")))


def test_text_only_rows_and_many_pictures(processor, tmp_path):
    rows = [
        {"problem": "2+2?", "answer": "4", "images": []},
        {"problem": "Same? <image> <image>", "answer": "no", "images": ["0.png", "1.png"]},
    ]
    (tmp_path / "0.png").write_bytes(png(0))
    (tmp_path / "1.png").write_bytes(png(1, width=112))
    dataset = open_train(processor, write_lines(tmp_path / "train.jsonl", rows))
    assert dataset.prompt(0).inputs.pixel_values_PD is None and dataset.prompt(0).images == ()
    assert dataset.prompt(1).inputs.grid_thw_I3.tolist() == [[1, 4, 4], [1, 4, 8]]
    plain = open_train(processor, write_lines(tmp_path / "plain.jsonl", [{"problem": "2+2?", "answer": "4"}]))
    assert plain.prompt(0).inputs.pixel_values_PD is None


def test_presets(processor, tmp_path):
    (tmp_path / "0.png").write_bytes(png(0))
    tiger = {"question": "<image>How many?", "answer": "\\boxed{3}", "image": ["0.png"], "qid": "x"}
    papo = {"problem": "<image>How many?", "answer": "3", "images": ["0.png"]}
    for name, row in (("tiger", tiger), ("papo", papo)):
        dataset = open_train(processor, write_lines(tmp_path / f"{name}.jsonl", [row]), preset="virl39k")
        assert dataset.prompt(0).problem == "<image>How many?" and dataset.prompt(0).images == (png(0),)
    assert open_train(processor, tmp_path / "papo.jsonl", preset="geometry3k").prompt(0).answer == "3"
    with pytest.raises(ValueError, match=r"data.preset: .* is not laid out as geometry3k, has question, answer, image"):
        open_train(processor, tmp_path / "tiger.jsonl", preset="geometry3k")


def test_sources_that_cannot_be_read(processor, tmp_path):
    with pytest.raises(ValueError, match=r"data.train: cannot read .*gone.parquet \(split train\): no such file"):
        open_train(processor, tmp_path / "gone.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"data.train: cannot read .*broken.parquet"):
        open_train(processor, tmp_path / "broken.parquet")
    with pytest.raises(ValueError, match=r"data.train: cannot read .*notes.txt \(split train\): unknown kind of file"):
        open_train(processor, write_lines(tmp_path / "notes.txt", [{}]))
    with pytest.raises(ValueError, match=r"data.columns.answer: .* has no column 'answer', has problem"):
        open_train(processor, write_lines(tmp_path / "a.jsonl", [{"problem": "x"}]))
    with pytest.raises(ValueError, match=r"data.eval: not set"):
        PromptDataset(DATA, "eval", processor)


def write_parquet(path, **columns):
    datasets.Dataset.from_dict(columns).to_parquet(path)
    return str(path)


def test_a_column_of_pictures_that_is_not_there(processor, tmp_path):
    """The name that somebody gave must be there; the default one, where another column seems to hold them."""
    text = {"problem": ["2+2?"], "answer": ["4"]}
    pictures = {**text, "image": [png(0)]}
    named = write_parquet(tmp_path / "a.parquet", **pictures)
    with pytest.raises(ValueError, match=r"data.columns.images: .*no column 'imgs', has problem, answer, image$"):
        open_train(processor, named, columns=ColumnsConfig(images="imgs"))
    with pytest.raises(ValueError, match=r"data.columns.images: .*no column 'images', but 'image', which seems"):
        open_train(processor, named)
    typed = write_parquet(tmp_path / "b.parquet", **text, view=[{"bytes": png(0), "path": None}])
    with pytest.raises(ValueError, match="but 'view', which seems"):
        open_train(processor, typed)
    said = open_train(processor, named, columns=ColumnsConfig(images=None))
    assert (
        said.prompt(0).images == () and not said.sources[0].lacks_image_column and "is null" in said.without_pictures()
    )

    plain = open_train(processor, write_parquet(tmp_path / "c.parquet", **text))
    assert plain.sources[0].lacks_image_column and plain.without_pictures().endswith("c.parquet has no column 'images'")
    empty = {"problem": ["2+2?"] * 3000, "answer": ["4"] * 3000, "images": [[]] * 3000}
    unseen = open_train(processor, write_parquet(tmp_path / "d.parquet", **empty))
    assert not unseen.sources[0].lacks_image_column and "none of 1000 rows of " in unseen.without_pictures()
    assert open_train(processor, named, columns=ColumnsConfig(images="image")).without_pictures() is None


def test_pictures_come_first_where_the_text_has_no_place_for_them(processor, tmp_path):
    cells = [[png(0), png(1)], [png(0), png(1)], []]
    problems = ["Same?", "Same as <image>?", "2+2?"]
    rows = open_train(
        processor, write_parquet(tmp_path / "x.parquet", problem=problems, answer=["1"] * 3, images=cells)
    )
    assert rows.prompt(0).problem == "<image><image>Same?" and rows.prompt(2).problem == "2+2?"
    with pytest.raises(BadRow, match=r"placeholder count \(1 <image> for 2 images\)"):
        rows.prompt(1)


def test_pictures_written_as_text(processor, tmp_path):
    text = base64.b64encode(png(0)).decode()
    address = f"data:image/png;base64,{text}"
    good = [
        text, base64.encodebytes(png(0)).decode(), address, {"bytes": text}, {"path": None, "bytes": text},
        {"url": address}, {"type": "image_url", "image_url": {"url": address}}, {"image": address},
    ]  # fmt: skip
    bad = {
        text[:200] + "*" + text[200:]: "image file missing", text[:-2]: "corrupt image", address[:-2]: "corrupt image",
        "https://example.org/" + "a" * 5000: "image is an address", text[:400] + ".png": "image file missing",
        text[:40] + "A" * 2_000_000: "image too large",
    }  # fmt: skip
    lines = [{"problem": "<image>?", "answer": "1", "images": [item]} for item in [*good, *bad]]
    for row, line in enumerate(lines):  # one file each: a column of JSON lines has one type
        name = write_lines(tmp_path / f"{row}.jsonl", [line])
        if row < len(good):
            assert open_train(processor, name).prompt(0).images == (png(0),), row
            continue
        with pytest.raises(BadRow) as caught:
            open_train(processor, name, max_image_pixels=1).prompt(0)
        assert caught.value.reason == list(bad.values())[row - len(good)] and len(str(caught.value)) < 350


def test_answers_of_files_are_what_is_written_in_them(processor, tmp_path):
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv/a.csv").write_text("problem,answer,images\n1?,007,\n2?,None,\n3?,1.50,\n4?,,\n")
    for name in ("csv", "csv/a.csv"):
        rows = open_train(processor, tmp_path / name)
        assert [rows.prompt(row).answers for row in range(3)] == [("007",), ("None",), ("1.50",)]
        with pytest.raises(BadRow, match="no answer"):
            rows.prompt(3)
    for dates in (["2020-05-17", "2021-01-02"], ["2020-05-17T10:00", "2021-01-02 10"]):
        lines = [{"problem": "when?", "answer": date, "also": [date]} for date in dates]
        name = write_lines(tmp_path / f"{len(dates[0])}.jsonl", lines)
        for columns in (ColumnsConfig(), ColumnsConfig(answer="also")):
            dated = open_train(processor, name, columns=columns)
            assert [dated.prompt(row).answer for row in (0, 1)] == dates
    labels = datasets.Features(problem=datasets.Value("string"), answer=datasets.ClassLabel(names=["square", "disc"]))
    table = datasets.Dataset.from_dict({"problem": ["?"] * 2, "answer": [1, 0]}, features=labels)
    table.to_parquet(tmp_path / "l.parquet")
    assert open_train(processor, tmp_path / "l.parquet").prompt(0).answer == "disc"


def test_folders_and_files_whose_names_look_like_patterns(processor, tmp_path):
    """A name that is there is taken literally, and so is the part of a pattern that is there."""
    folder = tmp_path / "data [v2]?*"
    (folder / "pictures").mkdir(parents=True)
    (tmp_path / "data 2").mkdir()  # what `[v2]` would match
    line = {"problem": "<image>?", "answer": "1", "images": ["0.png"]}
    for place, answer in ((folder / "a[1].jsonl", "1"), (folder / "b.jsonl", "2"), (tmp_path / "data 2/a1.jsonl", "3")):
        write_lines(place, [{**line, "answer": answer}])
        (place.parent / "0.png").write_bytes(png(0))
    datasets.Dataset.from_dict(rows_of([picture(0), picture(1)])).save_to_disk(folder / "saved")
    datasets.Dataset.from_dict({"problem": ["2+2?"], "answer": ["6"]}).to_parquet(folder / "pictures/x.parquet")
    found = {
        folder / "a[1].jsonl": ["1"], folder / "?.jsonl": ["2"], folder / "*.jsonl": ["1", "2"],
        tmp_path / "data [12]/*.jsonl": ["3"], folder / "saved": ["3", "4"], folder / "pictures": ["6"],
        folder / "**/x.parquet": ["6"],
    }  # fmt: skip
    for name, answers in found.items():
        rows = open_train(processor, name)
        assert [rows.prompt(row).answer for row in range(len(rows))] == answers, name
    with pytest.raises(ValueError, match=r"cannot read .* \(split train\): no file matches"):
        open_train(processor, folder / "z*.jsonl")
    with pytest.raises(ValueError, match=r"0.png: unknown kind of file, know \.parquet"):
        open_train(processor, folder / "*")

    labelled = tmp_path / "pictures [small]"
    labelled.mkdir()
    (labelled / "0.png").write_bytes(png(0))
    write_lines(labelled / "metadata.jsonl", [{"file_name": "0.png", "problem": "?", "answer": "7"}])
    rows = open_train(processor, labelled, columns=ColumnsConfig(images="image"))
    assert rows.prompt(0).answer == "7" and rows.prompt(0).images == (png(0),)


def test_files_of_one_set_must_have_the_same_columns(processor, tmp_path):
    full = {"problem": ["?"], "answer": ["1"], "images": [[]]}
    other = {
        "has no column 'images'": {"problem": ["?"], "answer": ["1"]},
        "has a column 'more', .*a.parquet has none": {**full, "more": [1]},
        "column 'answer' of .*b.parquet holds lists of string, that of .*a.parquet string": {**full, "answer": [["1"]]},
    }
    for number, (told, columns) in enumerate(other.items()):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        write_parquet(folder / "a.parquet", **full)
        write_parquet(folder / "b.parquet", **columns)
        for name in (folder / "*.parquet", folder):
            with pytest.raises(ValueError, match=r"^data.train: .*b.parquet.*") as caught:
                open_train(processor, name)
            assert re.search(told, str(caught.value)) and "\n" not in str(caught.value), caught.value
    lines = [{"problem": "?", "answer": "1", "images": []}, {"problem": "?", "answer": "1"}]
    write_lines(tmp_path / "a.jsonl", lines)
    write_lines(tmp_path / "b.jsonl", lines[::-1])
    assert len(open_train(processor, tmp_path / "[ab].jsonl")) == 4, "a row may leave a column out"
    write_lines(tmp_path / "b.jsonl", lines[1:])
    with pytest.raises(ValueError, match=r"b.jsonl has no column 'images', other files have"):
        open_train(processor, tmp_path / "[ab].jsonl")
    (tmp_path / "b.jsonl").write_text('{"problem": "?"\n')
    with pytest.raises(ValueError, match=r"cannot read .*: .*/b.jsonl: "):
        open_train(processor, tmp_path / "[ab].jsonl")


def test_videos_and_turns_are_named(processor, tmp_path):
    turns = {"problem": [{"role": "user", "content": "<image>?"}], "answer": ["1", "one"], "images": ["0.png"]}
    (tmp_path / "0.png").write_bytes(png(0))
    prompt = open_train(processor, write_lines(tmp_path / "t.jsonl", [turns])).prompt(0)
    assert (prompt.problem, prompt.answer, prompt.answers) == ("<image>?", "1", ("1", "one"))
    clip = {"problem": "?", "answer": "1", "videos": ["0.mp4"]}
    with pytest.raises(BadRow, match=r"row 0: video \(in column 'videos': only pictures are read\)"):
        open_train(processor, write_lines(tmp_path / "v.jsonl", [clip])).prompt(0)


BAD = {
    "corrupt image": {"images": ["torn.png"]},
    "image file missing": {"images": ["gone.png"]},
    "placeholder count": {"problem": "<image> and <image>?"},
    "no answer": {"answer": " "},
    "no problem": {"problem": ""},
    "prompt too long": {"problem": "<image>" + "long " * 30},
    "image too extreme": {"images": ["thin.png"]},
    "vision token in text": {"problem": "<image> <|vision_end|>"},
}


@pytest.fixture
def bad_file(tmp_path):
    """Row 0 good, then one row of each kind of bad, then nine good ones: 18 rows."""
    (tmp_path / "0.png").write_bytes(png(0))
    (tmp_path / "torn.png").write_bytes(png(0)[:3000])
    (tmp_path / "thin.png").write_bytes(png(0, width=804, height=4))
    good = {"problem": "<image>How many?", "answer": "3", "images": ["0.png"]}
    rows = [good, *({**good, **change} for change in BAD.values()), *([good] * 9)]
    return write_lines(tmp_path / "train.jsonl", rows)


def test_bad_rows_are_named_with_their_reason(processor, bad_file):
    dataset = open_train(processor, bad_file)
    for row, reason in enumerate(BAD, start=1):
        with pytest.raises(BadRow, match=f"^row {row}: {reason}") as caught:
            dataset.prompt(row)
        assert (caught.value.row, caught.value.reason) == (row, reason)
    assert dataset.prompt(0).answer == dataset.prompt(9).answer == "3"


def test_answers_are_not_needed_for_scoring(processor, bad_file):
    data = DATA.model_copy(update={"train": bad_file})
    dataset = PromptDataset(data, "train", processor, needs_answer=False)
    assert dataset.prompt(list(BAD).index("no answer") + 1).answer == ""


def draw(dataset, cursor, bad_rows, rank=0, size=1):
    return draw_prompts(
        dataset, cursor, num_prompts=12, updates_per_step=3, data_rank=rank, data_size=size, bad_rows=bad_rows
    )


def test_skipped_rows_are_replaced_alike_on_any_number_of_ranks(processor, bad_file):
    dataset, cursor = open_train(processor, bad_file), DataCursor(num_rows=18, seed=0)
    tally = BadRows("skip")
    whole = draw(dataset, cursor, tally)
    ids = [[prompt.id for prompt in update] for update in whole.updates]
    assert [len(update) for update in ids] == [4, 4, 4] and whole.cursor.position == 12
    assert whole.positions == ((0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11))
    assert tally.by_row and all(int(name.split(":")[1]) not in range(1, 9) for update in ids for name in update)
    for size in (2, 3):
        shares = [draw(dataset, cursor, BadRows("skip"), rank, size) for rank in range(size)]
        joined = [[prompt.id for share in shares for prompt in share.updates[update]] for update in range(3)]
        assert joined == ids
        assert all(share.cursor == whole.cursor for share in shares)


def test_bad_rows_are_counted_once(processor, bad_file):
    dataset, cursor, tally = open_train(processor, bad_file), DataCursor(num_rows=18, seed=0), BadRows("skip")
    for _ in range(6):  # four epochs
        cursor = draw(dataset, cursor, tally).cursor
    assert tally.counts == {reason: 1 for reason in BAD}
    assert str(tally).splitlines()[2] == "row 3: placeholder count (2 <image> for 1 images)"


def test_stop_names_the_row(processor, bad_file):
    with pytest.raises(BadRow, match=r"^row [1-8]: "):
        draw(open_train(processor, bad_file), DataCursor(num_rows=18, seed=0), BadRows("stop"))


def test_a_dataset_without_good_rows_ends(processor, tmp_path):
    path = write_lines(tmp_path / "train.jsonl", [{"problem": "<image>", "answer": "3"}] * 3)
    told = r"data.train: no good row left in .*: placeholder count 3; the first: row 0: placeholder count \(1 <image>"
    with pytest.raises(ValueError, match=told):
        draw(open_train(processor, path), DataCursor(num_rows=3, seed=0), BadRows("skip"))


def test_evaluation_leaves_bad_rows_out(processor, bad_file):
    tally = BadRows("skip")
    rows = [prompt.row for prompt in prompts_of(open_train(processor, bad_file), range(18), tally)]
    assert rows == [0, *range(9, 18)] and sorted(tally.by_row) == list(range(1, 9))


def two_files(tmp_path):
    """Two files whose columns differ: five rows about one picture, four of text of which the last is bad."""
    (tmp_path / "0.png").write_bytes(png(0))
    rows = [
        {"problem": f"<image>How many {row}?", "answer": str(row), "images": ["0.png"], "level": row, "kind": kind}
        for row, kind in enumerate(["bar", "pie", "bar", None, "line"])
    ]
    texts = [{"question": f"{row}+1?", "answer": row + 1} for row in range(3)] + [{"question": "", "answer": 9}]
    return write_lines(tmp_path / "a.jsonl", rows), write_lines(tmp_path / "b.jsonl", texts)


def open_sources(processor, *entries, **settings):
    data = DataConfig.model_validate({**DATA.model_dump(), "train": list(entries), **settings})
    return PromptDataset(data, "train", processor)


def test_sources_are_one_numbered_data_set(processor, tmp_path):
    first, second = two_files(tmp_path)
    plain, one = open_train(processor, first), open_sources(processor, first)
    assert one.fingerprints() == plain.fingerprints() and one.prompt(4).source == plain.prompt(4).source == ""
    columns = {"problem": "question", "images": None}
    data = open_sources(
        processor, {"path": first, "filter": {"kind": ["bar", "line"]}}, {"path": second, "columns": columns}
    )
    assert len(data) == 7 and [data.prompt(row).id for row in (0, 6 - 1)] == ["train:0", "train:5"]
    assert [data.prompt(row).answer for row in range(6)] == ["0", "2", "4", "1", "2", "3"]
    assert [data.prompt(row).source for row in (0, 3)] == ["a", "b"] and data.images(2) == (png(0),)
    assert data.prompt(2).columns == {"level": 4, "kind": "line"} and data.prompt(3).columns == {}
    assert data.column(5, "question") == "2+1?"
    with pytest.raises(BadRow, match=rf"^data.train\[1\]: {re.escape(second)}: row 3: no problem") as caught:
        data.prompt(6)
    assert caught.value.row == 6 and caught.value.named_by("data.train") == str(caught.value)
    assert data.fingerprints() != plain.fingerprints() and data.fingerprints().keys() == plain.fingerprints().keys()
    assert data.first_rows(4) == [0, 3, 4, 5] and data.first_rows(None) == list(range(7))


def test_a_bad_row_behind_a_filter_has_its_number_in_the_file(processor, bad_file):
    with open(bad_file) as lines:
        rows = [{**json.loads(line), "keep": number > 1} for number, line in enumerate(lines)]
    write_lines(pathlib.Path(bad_file), rows)
    data = open_sources(processor, {"path": bad_file, "filter": {"keep": True}})
    with pytest.raises(BadRow, match=r"^row 2: "):
        data.prompt(0)


def test_sources_by_a_column(processor, tmp_path):
    first, second = two_files(tmp_path)
    data = open_sources(processor, {"path": first, "source_column": "kind", "name": "charts"})
    assert [data.prompt(row).source for row in range(5)] == ["bar", "pie", "bar", "charts", "line"]
    write_lines(tmp_path / "many.jsonl", [{"problem": "x", "answer": "y", "id": row} for row in range(65)])
    with pytest.raises(ValueError, match=r"data.train\[0\].source_column: 'id' of .* more than 64 different names"):
        open_sources(processor, {"path": str(tmp_path / "many.jsonl"), "source_column": "id"})
    with pytest.raises(ValueError, match=r"data.train\[0\].source_column: .*a.jsonl has no column 'gone', has problem"):
        open_sources(processor, {"path": first, "source_column": "gone"}, second)


def test_what_a_source_lacks_is_named_with_its_key(processor, tmp_path):
    first, second = two_files(tmp_path)
    for entry, fault in (
        (second, r"data.columns.problem: .*b.jsonl has no column 'problem', has question"),
        ({"path": second, "columns": {"problem": "ask"}}, r"data.train\[1\].columns.problem: .* has no column 'ask'"),
        ({"path": second, "preset": "virl39k"}, r"data.train\[1\].preset: .* is not laid out as virl39k"),
        (
            {"path": first, "split": "test", "filter": {"level": 9}},
            r"data.train\[1\].filter: none of the 5 rows of .* passes",
        ),
        (
            {"path": first, "filter": {"size": 9}},
            r"data.train\[1\].filter: .*a.jsonl has no column 'size', has problem",
        ),
        (str(tmp_path / "c.jsonl"), r"data.train\[1\]: cannot read .*c.jsonl \(split train\): no such file"),
    ):
        with pytest.raises(ValueError, match=fault):
            open_sources(processor, first, entry)


def rows_of_code(split, *, number, picture=False):
    """A data source: rows as a function makes them."""
    cells = {"images": [png(0)]} if picture else {}
    return [{"problem": f"{split} {row}?", "answer": row, **cells} for row in range(number)]


def hub_like(split):
    return datasets.Dataset.from_list([{"problem": "one?", "answer": "one", "images": [picture(0)]}])


def faulty(split, kind="none"):
    return {"none": None, "texts": ["a"], "mixed": [{"problem": "x", "answer": [1]}, {"problem": 1, "answer": "2"}]}[
        kind
    ]


def even(row):
    return int(row["answer"]) % 2 == 0


def test_rows_of_a_function(processor):
    made = {
        "function": f"{__name__}:rows_of_code",
        "options": {"number": 3, "picture": True},
        "filter": f"{__name__}:even",
    }
    data = open_sources(processor, made, {"function": f"{__name__}:hub_like", "split": "x"})
    assert [data.prompt(row).problem for row in range(3)] == ["<image>train 0?", "<image>train 2?", "<image>one?"]
    assert [data.prompt(row).source for row in range(3)] == ["rows_of_code", "rows_of_code", "hub_like"]
    for options, name, fault in (
        ({}, "rows_of_code", r"does not take \(split\): missing a required"),
        ({"number": "x"}, "rows_of_code", "failed: TypeError: 'str' object"),
        ({}, "faulty", "the rows of .* are no table: it returned NoneType, not a datasets.Dataset or a list of dicts"),
        ({"kind": "texts"}, "faulty", "among them is str, not a dict"),
        ({"kind": "mixed"}, "faulty", "the rows of .* are no table: "),
        ({"kind": "y"}, "faulty", "failed: KeyError: 'y'"),
    ):
        with pytest.raises(ValueError, match=rf"^data.train\[0\].function: .*{fault}") as caught:
            open_sources(processor, {"function": f"{__name__}:{name}", "options": options})
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=rf"^data.train\[0\].filter: {__name__}:even: row 0: ValueError: invalid lit"):
        open_sources(processor, {"function": f"{__name__}:hub_like", "filter": f"{__name__}:even"})


def test_weights_say_what_an_epoch_draws(processor, tmp_path):
    first, second = two_files(tmp_path)
    data = DataConfig.model_validate({**DATA.model_dump(), "train": [
        {"path": first, "weight": 2}, {"path": second, "columns": {"problem": "question"}, "weight": 0.5},
    ]})  # fmt: skip
    dataset = PromptDataset(data, "train", processor)
    cursor = first_cursor(data, dataset, 5, 4)
    drawn = [next(cursor.rows(position)) for position in range(24)]
    for epoch in (drawn[:12], drawn[12:]):
        assert sorted(row for row in epoch if row < 5) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
        assert len({row for row in epoch if row >= 5}) == 2
    assert drawn[:12] != sorted(drawn[:12]) != drawn[12:]
    state = cursor.advance(7).state_dict()
    again = first_cursor(data, dataset, 5, 4)
    resumed = again.load_state_dict(state)
    assert [next(resumed.rows(position)) for position in range(7, 24)] == drawn[7:]
    other = data.model_copy(update={"train": [entry.model_copy(update={"weight": 1.5}) for entry in data.train]})
    changed = first_cursor(other, PromptDataset(other, "train", processor), 5, 4)
    assert changed.order_fingerprint() != cursor.order_fingerprint(), "refused on resuming, as another order"
    plain = open_sources(processor, first, {"path": second, "columns": {"problem": "question"}})
    assert first_cursor(data, plain, 5, 4) == DataCursor(9, 5), "without weights nothing changes"


def test_the_example_of_a_data_source(processor):
    name = "examples.data_source.squares"
    made = {"function": f"{name}:rows", "options": {"number": 20}}
    data = open_sources(processor, {**made, "name": "all"}, {**made, "name": "easy", "filter": f"{name}:is_easy"})
    assert 20 < len(data) < 40 and data.prompt(0).columns == {"squares": int(data.prompt(0).answer)}
    assert data.images(0) == open_sources(processor, made).images(0), "the same rows on every rank"


def test_prompts_of_a_certificate_are_the_good_rows_and_where_there_is_none_the_reasons_are_told(processor, tmp_path):
    (tmp_path / "a.png").write_bytes(png(0))
    good = {"problem": "How many?", "answer": "3", "images": ["a.png"]}
    bad = [{**good, "images": ["gone.png"]}, {**good, "images": ["a.png", "a.png"]}, {**good, "answer": ""}]

    def chosen(*rows):
        config = load_config(None, [f"data.train={write_lines(tmp_path / f'{len(rows)}.jsonl', rows)}"])
        data = DATA.model_copy(update={"train": config.data.train, "on_bad_row": "skip"})
        return prompts_to_certify(config.model_copy(update={"data": data}), processor)

    assert [prompt.problem for prompt in chosen(*bad, good)] == ["<image>How many?"], "pictures come first"
    with pytest.raises(ValueError) as error:
        chosen(*bad)
    assert "data.train: none of the first 3 rows of" in str(error.value)
    for reason in ("image file missing 1", "the same picture twice 1", "no answer 1", "the first: row 0: image file"):
        assert reason in str(error.value)


def test_each_row_has_its_own_system_turn_and_else_that_of_the_settings(processor, tmp_path):
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "how many?"}]
    rows = [
        {"problem": "how many?", "answer": "3", "told": "Be brief."},
        {"problem": "how many?", "answer": "3", "told": ""},
        {"problem": "how many?", "answer": "3", "told": "See <|image_pad|>"},
        {"problem": "how many?", "answer": "3", "told": "so " * 99},
    ]
    path, talks = (
        write_lines(tmp_path / "a.jsonl", rows),
        write_lines(tmp_path / "b.jsonl", [{**rows[1], "problem": turns}]),
    )
    settled = load_processor(processor.folder, DATA.model_copy(update={"system": "Be exact."}))
    columns = ColumnsConfig(system="told", images=None)
    for given, second in ((processor, None), (settled, "Be exact.")):
        dataset = open_train(given, path, columns=columns)
        first = dataset.prompt(0)
        assert first.system == "Be brief." and dataset.prompt(1).system is None
        for prompt, system in ((first, "Be brief."), (dataset.prompt(1), second)):
            text = given.tokenizer.decode(prompt.inputs.token_ids_S.tolist())
            assert text.startswith("<|im_start|>system\n" + system if system else "<|im_start|>user"), text
        assert open_train(given, talks, columns=ColumnsConfig(images=None)).prompt(0).system == "Be kind."
    for row, reason in ((2, "vision token in text"), (3, "prompt too long")):
        with pytest.raises(BadRow, match=reason):
            dataset.prompt(row)
    with pytest.raises(ValueError, match=r"data.columns.system: .* has no column 'tone'"):
        open_train(processor, path, columns=ColumnsConfig(system="tone", images=None))
    other = write_lines(tmp_path / "c.jsonl", [{**rows[0], "told": "Be long."}, *rows[1:]])
    prints = [open_train(processor, name, columns=columns).fingerprints() for name in (path, other)]
    assert prints[0] != prints[1], "the column is part of what the rows are"
    plain = ColumnsConfig(images=None)
    assert (
        open_train(processor, path, columns=plain).fingerprints()
        == open_train(processor, other, columns=plain).fingerprints()
    )
