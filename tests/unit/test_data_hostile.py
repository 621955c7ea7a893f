"""Data sets made to harm: images elsewhere on the machine, images that explode, texts without end, programs."""

import io
import json
import os
import re
import socket
import struct
import weakref
import zlib
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from PIL import Image

from megatron_papo.config import ColumnsConfig, Config, DataConfig, MaskConfig
from megatron_papo.data import (
    BadRow,
    BadRows,
    DataCursor,
    Masks,
    PromptDataset,
    dataset,
    draw_prompts,
    load_processor,
)
from megatron_papo.data.images import BadImage, decode_image
from megatron_papo.observe.samples import beside_each_other
from tests.support.tiny import make_tiny_folder

DATA = DataConfig(min_pixels=28 * 28, max_pixels=112 * 112, instruction="", max_prompt_tokens=80)


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return load_processor(make_tiny_folder(tmp_path_factory.mktemp("model")), DATA)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def picture(*, size=(56, 56), kind="PNG", **how):
    pixels = np.random.RandomState(0).randint(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind, **how)
    return buffer.getvalue()


def header_of(width, height):
    """A PNG of a few bytes that says it is as large as this."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def open_rows(processor, folder, *rows, **settings):
    folder.mkdir(exist_ok=True)
    good = {"problem": "<image>How many?", "answer": "3", "images": []}
    (folder / "train.jsonl").write_text("".join(json.dumps({**good, **row}) + "\n" for row in rows))
    data = DATA.model_copy(update={"train": str(folder / "train.jsonl"), **settings})
    return PromptDataset(data, "train", processor)


def refused(rows, row, reason, detail=None):
    with pytest.raises(BadRow, match=detail) as caught:
        rows.prompt(row)
    assert (caught.value.row, caught.value.reason) == (row, reason) and "\n" not in str(caught.value)


def test_only_regular_files_under_the_data_sets_folder_are_read(processor, tmp_path):
    folder, outside = tmp_path / "set", tmp_path / "elsewhere"
    (folder / "inner").mkdir(parents=True)
    outside.mkdir()
    (outside / "secret.png").write_bytes(picture())
    (folder / "own.png").write_bytes(picture())
    (folder / "inner/link.png").symlink_to("../own.png")
    (folder / "out.png").symlink_to(outside / "secret.png")
    (folder / "folder_out").symlink_to(outside)
    (folder / "loop.png").symlink_to("loop.png")
    os.mkfifo(folder / "fifo")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "socket"))
    good = ["own.png", str(folder / "own.png"), "inner/link.png", "inner/../own.png"]
    bad = {
        str(outside / "secret.png"): "image outside the data set",
        "../elsewhere/secret.png": "image outside the data set",
        "out.png": "image outside the data set",
        "folder_out/secret.png": "image outside the data set",
        "/dev/zero": "image outside the data set",
        "/proc/self/environ": "image outside the data set",
        "fifo": "image is no file",
        "socket": "image is no file",
        "inner": "image is no file",
        "loop.png": "image file missing",
        "own.png/x": "image file missing",
        "a\x00b": "image file missing",
        "x" * 5000: "image file missing",
        "https://example.org/a.png": "image is an address",
        "file:///etc/passwd": "image is an address",
        "data:image/png,AAAA": "image is an address",
        "data:image/png;base64,AAAA": "corrupt image",
        "data:image/png;base64,A": "corrupt image",
    }
    rows = open_rows(processor, folder, *({"images": [name]} for name in [*good, *bad]))
    for row in range(len(good)):
        assert rows.prompt(row).images == (picture(),)
    for row, reason in enumerate(bad.values(), start=len(good)):
        refused(rows, row, reason)
    refused(rows, len(good), "image outside the data set", "data.image_roots names more folders")
    listener.close()

    opened = open_rows(processor, folder, *({"images": [name]} for name in bad), image_roots=[outside])
    assert [opened.prompt(row).images for row in range(4)] == [(picture(),)] * 4
    refused(opened, 4, "image outside the data set")
    with pytest.raises(ValueError, match=r"^data.image_roots: .*nowhere is no folder$"):
        open_rows(processor, folder, {}, image_roots=[tmp_path / "nowhere"])


def test_bytes_win_and_a_picture_folders_own_list_is_checked_too(processor, tmp_path):
    cells = [[{"bytes": picture(), "path": "/etc/passwd"}], [{"bytes": None, "path": "/etc/passwd"}]]
    table = datasets.Dataset.from_dict({"problem": ["<image>?"] * 2, "answer": ["3"] * 2, "images": cells})
    table.to_parquet(tmp_path / "x.parquet")
    rows = PromptDataset(DATA.model_copy(update={"train": str(tmp_path / "x.parquet")}), "train", processor)
    assert rows.prompt(0).images == (picture(),)
    refused(rows, 1, "image outside the data set")

    folder = tmp_path / "pictures"  # the library looks at names, not at where they lead
    folder.mkdir()
    for place in (folder / "0.png", tmp_path / "out.png"):
        place.write_bytes(picture())
    (folder / "1.png").symlink_to(tmp_path / "out.png")
    lines = [{"file_name": name, "problem": "<image>?", "answer": "3"} for name in ("0.png", "1.png")]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = DATA.model_copy(update={"train": str(folder), "columns": ColumnsConfig(images="image")})
    rows = PromptDataset(data, "train", processor)
    assert rows.prompt(0).images == (picture(),)
    refused(rows, 1, "image outside the data set")


def test_the_library_decodes_nothing_of_any_column(processor, tmp_path):
    broken = {"bytes": b"%!PS-Adobe-3.0 EPSF-3.0\n", "path": None}
    table = {
        "problem": ["2+2?"], "answer": ["4"], "images": [[]], "more": [{"inner": [broken]}],
    }  # fmt: skip
    features = datasets.Features(
        problem=datasets.Value("string"), answer=datasets.Value("string"), images=datasets.List(datasets.Image()),
        more={"inner": datasets.List(datasets.Image())},
    )  # fmt: skip
    plain = datasets.Features({**features, "more": {"inner": datasets.List(datasets.Image(decode=False))}})
    datasets.Dataset.from_dict(table, features=plain).cast(features).save_to_disk(tmp_path / "saved")
    rows = PromptDataset(DATA.model_copy(update={"train": str(tmp_path / "saved")}), "train", processor)
    assert rows.prompt(0).answer == "4" and rows.column(0, "more") == {"inner": [broken]}


def test_a_data_set_that_comes_as_a_program_is_refused(processor, tmp_path):
    folder = tmp_path / "program"
    folder.mkdir()
    (folder / "program.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    for more in ({}, {"x.jsonl": '{"problem": "2+2?", "answer": "4"}\n'}):
        for name, text in more.items():
            (folder / name).write_text(text)
        try:
            PromptDataset(DATA.model_copy(update={"train": str(folder)}), "train", processor)
        except ValueError as error:
            assert str(error).startswith("data.train: cannot read ")
        assert not (tmp_path / "ran").exists()


def test_other_formats_are_not_tried():
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"):
        assert decode_image(picture(kind=kind)).size == (56, 56)
    phone = picture(kind="MPO", save_all=True, append_images=[Image.new("RGB", (56, 56))])
    assert decode_image(phone).size == (56, 56)
    for kind in ("EPS", "PPM", "ICO", "PDF", "SGI", "TGA"):
        with pytest.raises(BadImage, match="none of PNG, JPEG, ") as caught:
            decode_image(picture(kind=kind))
        assert caught.value.reason == "corrupt image"


def test_a_jpeg_of_scans_without_end_and_odd_metadata():
    """What a phone hangs behind its picture, and thumbnails within, are no scans of it."""
    jpeg = picture(kind="JPEG", progressive=True, exif=b"Exif\0\0" + b"\xff\xda" * 500 + b"\xff" * 1000)
    assert decode_image(jpeg + b"\xff\xda" * 500).size == (56, 56)
    end = jpeg.rindex(b"\xff\xd9")
    last = jpeg[jpeg.rindex(b"\xff\xc4", 0, end) : end]
    assert decode_image(jpeg[:end] + last * 50 + jpeg[end:]).size == (56, 56)
    with pytest.raises(BadImage, match="more than 100 scans"):
        decode_image(jpeg[:end] + last * 150 + jpeg[end:])


def test_the_size_that_a_header_states_is_looked_at_first(processor, tmp_path):
    rows = open_rows(processor, tmp_path / "set", {"images": ["0.png"]}, {"images": ["1.png"]}, {"images": ["2.png"]})
    for name, data in (("0", header_of(8192, 8192)), ("1", header_of(60_000, 60_000)), ("2", b"\0")):
        (tmp_path / f"set/{name}.png").write_bytes(data)
    refused(rows, 0, "image too large", "8192 x 8192 pixels, data.max_image_pixels is 33554432")
    refused(rows, 1, "image too large")
    os.truncate(tmp_path / "set/2.png", 2**40)
    refused(rows, 2, "image too large", "1099511627776 bytes, data.max_image_pixels allows")
    small = open_rows(processor, tmp_path / "small", {"images": ["0.png"]}, max_image_pixels=56 * 56 - 1)
    (tmp_path / "small/0.png").write_bytes(picture())
    refused(small, 0, "image too large", "56 x 56 pixels, data.max_image_pixels is 3135")


def test_pictures_of_a_row_are_in_memory_one_at_a_time(processor, tmp_path, monkeypatch):
    decoded, real = [], dataset.decode_image

    def decode(*arguments):
        assert not [image for image in decoded if image() is not None], "the one before is still there"
        image = real(*arguments)
        decoded.append(weakref.ref(image))
        return image

    monkeypatch.setattr(dataset, "decode_image", decode)
    row = {"problem": "<image>" * 3, "images": ["0.png"] * 3}
    rows = open_rows(processor, tmp_path / "set", row, {"problem": "<image>" * 12, "images": ["0.png"] * 12})
    (tmp_path / "set/0.png").write_bytes(picture(size=(112, 112)))
    short = open_rows(processor, tmp_path / "set", row, max_prompt_tokens=100)
    assert short.prompt(0, Masks(MaskConfig(), seed=0)).masked_pixel_values_PD.shape == (192, 1176)
    assert len(decoded) == 3
    del rows
    rows = open_rows(processor, tmp_path / "set", {"problem": "<image>" * 20, "images": ["0.png"] * 20})
    refused(rows, 0, "prompt too long", r"80 tokens|\d+ tokens, data.max_prompt_tokens is 80")
    assert len(decoded) <= 6, "the rest is not decoded"


def test_texts_without_end_are_not_tokenised(processor, tmp_path):
    long = "x" * 100_000
    rows = open_rows(processor, tmp_path / "set", {"problem": long}, {"problem": "2+2?", "answer": long})
    refused(rows, 0, "prompt too long", "100000 letters are more than 80 tokens")
    refused(rows, 1, "answer too long", "100000 letters, at most 65536 are compared")


def test_demonstrations_are_texts_of_an_end_without_pictures(processor, tmp_path):
    from megatron_papo.sft import Demonstrations

    most = 8192 * processor.most_letters_of_a_token
    told = {
        "<|image_pad|>": "vision token in text (<|image_pad|> in the response)",
        "x" * (most + 1): f"response too long ({most + 1} letters, train.tokens_per_micro_batch is 8192)",
        "7 " * 8192: "response too long (",
        "": "no response (no text in 'response')",
    }
    rows = [{"problem": "2+2?", "images": [], "answer": {"of": "no use"}, "response": text} for text in [*told, "4"]]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DATA.model_copy(update={"train": str(tmp_path / "train.jsonl")})
    demonstrations = Demonstrations(Config(data=data, train={"tokens_per_micro_batch": 8192}), processor)
    for row, message in enumerate(told.values()):
        with pytest.raises(BadRow) as caught:
            demonstrations.prompt(row)
        assert str(caught.value).startswith(f"row {row}: {message}")
    assert demonstrations.group(demonstrations.prompt(4)).rollouts[0].text == "4"

    for size in (1, 2):
        shares = [_demonstrated(demonstrations, rank, size) for rank in range(size)]
        assert [text for share, _ in shares for text in share] == ["4"] * 6, "others take the place of bad ones"
        assert set().union(*(bad for _, bad in shares)) == {0, 1, 2, 3}
    with pytest.raises(ValueError, match=r"no column 'reply', has problem, images, answer, response$"):
        Demonstrations(Config(data=data, sft={"response_column": "reply"}), processor)


def test_a_run_says_that_it_reads_no_pictures(processor, tmp_path, capsys):
    from megatron_papo.training.console import warn_of_missing_images

    text = {"problem": "2+2?", "answer": "4"}
    told = {
        "a": (
            [text],
            {},
            "has no column 'images': rows are read without pictures",
            "the perception terms have nothing",
        ),
        "b": ([text], {"columns": ColumnsConfig(images=None)}, "", "images is null: the perception terms have nothing"),
        "c": (
            [{**text, "images": []}],
            {},
            "",
            "none of 1 rows of .*, which has 1, holds a picture in 'images': the perc",
        ),
        "d": ([{**text, "images": ["0.png"]}], {}, "", ""),
    }
    for name, (lines, settings, *expected) in told.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        data = DATA.model_copy(update={"train": str(tmp_path / f"{name}.jsonl"), **settings})
        rows = PromptDataset(data, "train", processor)
        for perception, text_of_warning in zip((False, True), expected):
            warn_of_missing_images(SimpleNamespace(is_writer=True), rows, perception=perception)
            said = capsys.readouterr().err
            assert bool(said) == bool(text_of_warning) and re.search(text_of_warning, said)
            assert not said or said.startswith("papo: warning: data.train: ")
        warn_of_missing_images(SimpleNamespace(is_writer=False), rows, perception=True)
    assert not capsys.readouterr().err
    both = DATA.model_copy(update={"train": [str(tmp_path / "d.jsonl"), str(tmp_path / "a.jsonl")]})
    warn_of_missing_images(SimpleNamespace(is_writer=True), PromptDataset(both, "train", processor), perception=True)
    assert re.fullmatch(
        r"papo: warning: data.train\[1\]: .*/a.jsonl has no column 'images': rows are read without pictures\n",
        capsys.readouterr().err,
    )


def _demonstrated(rows, rank, size):
    """What a data rank would learn from in a step, and the bad rows that it met."""
    bad_rows = BadRows("skip")
    draw = draw_prompts(
        rows, DataCursor(len(rows), seed=0), num_prompts=6, updates_per_step=1, data_rank=rank, data_size=size,
        bad_rows=bad_rows,
    )  # fmt: skip
    return [rows.group(prompt).rollouts[0].text for prompt in draw.prompts], set(bad_rows.by_row)


@pytest.mark.parametrize(("error", "reason"), [(MemoryError, "out of memory"), (RecursionError, "nested too deep")])
def test_what_takes_all_memory_is_a_bad_row(processor, tmp_path, monkeypatch, error, reason):
    rows = open_rows(processor, tmp_path / "set", {"images": ["0.png"]}, {"images": ["0.png"]})
    (tmp_path / "set/0.png").write_bytes(picture())

    def fail(*_, **__):
        raise error

    for place, name in ((processor, "pixel_values"), (processor, "text_ids"), (dataset, "image_bytes")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, fail)
            refused(rows, 0, reason)
            if name == "image_bytes":
                with pytest.raises(BadRow, match=reason):
                    rows.images(0)
    with monkeypatch.context() as patch:
        patch.setattr(rows, "images", fail)
        with pytest.raises(ValueError, match="swap found no other picture"):
            rows.prompt(0, Masks(MaskConfig(kind="swap"), seed=0))
        patch.setattr(dataset, "spoil_image", fail)
        with pytest.raises(BadRow, match=f"row 0: {reason}"):
            rows.prompt(0, Masks(MaskConfig(), seed=0))


def test_a_page_of_samples_reduces_what_is_long():
    assert beside_each_other([picture(size=(8000, 40)), picture(size=(40, 8000))]).size == (2048 + 4 + 10, 2048)
