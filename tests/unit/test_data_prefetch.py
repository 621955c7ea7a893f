"""A draw prepared ahead is the draw that would have been made on the spot; pictures are decoded once and let go."""

import io
import json
import threading
import time
import weakref
from collections import Counter
from functools import partial

import datasets
import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

from megatron_papo.config import DataConfig, MaskConfig
from megatron_papo.data import (
    BadRow,
    BadRows,
    DataCursor,
    Masks,
    Prefetch,
    PromptDataset,
    dataset,
    draw_prompts,
    load_processor,
    masking,
    prefetch,
)
from tests.support.tiny import make_tiny_folder

NUM_ROWS, CORRUPT = 12, (3, 7)
FIRST = DataCursor(NUM_ROWS, seed=0, shuffle=False)
RAW, PATCHES = MaskConfig(), MaskConfig(align="patches")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose tokenizer.json asks for truncation and padding, which calls then switch off and on."""
    folder = make_tiny_folder(tmp_path_factory.mktemp("model"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(500)
    tokenizer.enable_padding()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def rows(folder, tmp_path, monkeypatch):
    """Questions about one picture or two, in rows 3 and 7 a torn one, and one row without any."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    lines = []
    for row in range(NUM_ROWS):
        num_images = (1, 2, 0)[row] if row < 3 else 1
        images = [f"{row}_{index}.png" for index in range(num_images)]
        for index, name in enumerate(images):
            (tmp_path / name).write_bytes(_png(2 * row + index)[: 3000 if row in CORRUPT else None])
        problem = "<image>" * num_images + f"what is {row}?"
        lines.append(json.dumps({"problem": problem, "answer": "3", "images": images}))
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    data = DataConfig(
        train=str(tmp_path / "train.jsonl"), min_pixels=28 * 28, max_pixels=112 * 112, instruction="",
        on_bad_row="skip",
    )  # fmt: skip
    return PromptDataset(data, "train", load_processor(folder, data))


def _png(seed):
    pixels = np.random.RandomState(seed).randint(0, 256, (56 + seed, 70, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _open(rows, mask=RAW, *, ahead=True, num_steps=100, num_prompts=4):
    masks = mask and Masks(mask, seed=5)
    sizes = {"num_prompts": num_prompts, "updates_per_step": 2, "data_rank": 0, "data_size": 1}
    return Prefetch(partial(draw_prompts, rows, masks=masks, **sizes), num_steps=num_steps, ahead=ahead)


def _content(draw):
    """Everything a draw says, as plain values that compare bit for bit."""
    tensors = [
        (prompt.inputs.token_ids_S, prompt.inputs.pixel_values_PD, prompt.masked_pixel_values_PD)
        for prompt in draw.prompts
    ]
    values = [[None if tensor is None else tensor.tolist() for tensor in prompt] for prompt in tensors]
    return values, [prompt.id for prompt in draw.prompts], draw.positions, draw.cursor


@pytest.mark.parametrize("mask", [RAW, PATCHES, MaskConfig(kind="swap"), None], ids=["raw", "patches", "swap", "none"])
def test_the_same_draws_as_on_the_spot_whatever_the_number_of_rounds(rows, mask):
    ahead, on_the_spot = _open(rows, mask), _open(rows, mask, ahead=False)
    tallies = BadRows("skip"), BadRows("skip")
    cursor = FIRST
    for step in (0, 1, 1, 1, 2, 3, 3, 4):  # more rounds than the step before, fewer, as many
        found = ahead.take(cursor, step, tallies[0])
        wanted = on_the_spot.take(cursor, step, tallies[1])
        assert _content(found) == _content(wanted)
        assert list(tallies[0].by_row) == list(tallies[1].by_row)
        assert [str(bad) for bad in tallies[0].take_new()] == [str(bad) for bad in tallies[1].take_new()]
        assert any(prompt.masked_pixel_values_PD is not None for prompt in found.prompts) == (mask is not None)
        cursor = found.cursor
    ahead.close()
    assert tallies[0].by_row.keys() == set(CORRUPT)


@pytest.mark.parametrize(
    "mask",
    [RAW, PATCHES, MaskConfig(kind="swap"), MaskConfig(kind="noise"), MaskConfig(kind="crop")],
    ids=["raw", "patches", "swap", "noise", "crop"],
)
def test_a_row_that_comes_twice_in_a_step_is_masked_twice(rows, mask):
    """A step of 20 prompts of 12 rows, two of them bad: rows come again, and for others."""
    draws = _open(rows, mask, ahead=False, num_prompts=20)
    draw = draws.take(FIRST, 6, BadRows("skip"))
    assert [prompt.visit for prompt in draw.prompts] == draw.places == list(range(20))
    seen = [(prompt.row, prompt.masked_pixel_values_PD) for prompt in draw.prompts if prompt.has_image]
    assert max(Counter(row for row, _ in seen).values()) >= 3
    views = {(row, view.numpy().tobytes()) for row, view in seen}
    assert len(views) >= len(seen) - 1, "of a picture of six patches two visits may leave the same"


def test_masks_are_those_of_the_visit_and_of_nothing_else(rows):
    with_rounds, alone = _open(rows), _open(rows, ahead=False)
    second = with_rounds.take(with_rounds.take(FIRST, 6, BadRows("skip")).cursor, 6, BadRows("skip"))
    with_rounds.close()
    assert _content(second) == _content(alone.take(FIRST.advance(4), 7, BadRows("skip")))
    assert _content(second)[0] != _content(alone.take(FIRST.advance(4 + NUM_ROWS), 6, BadRows("skip")))[0]


def test_another_cursor_than_the_next_is_drawn_anew(rows):
    draws, bad_rows = _open(rows), BadRows("skip")
    draws.take(FIRST, 0, bad_rows)
    resumed = draws.take(FIRST.advance(8), 1, bad_rows)
    draws.close()
    assert [prompt.row for prompt in resumed.prompts] == [8, 9, 10, 11]
    assert not bad_rows.by_row or list(bad_rows.by_row) == [3], "row 7 was prepared for nobody"


def test_a_bad_row_stops_the_run_at_its_own_step(rows):
    draws, bad_rows = _open(rows, num_prompts=2), BadRows("stop")
    first = draws.take(FIRST, 0, bad_rows)
    draws._work._thread.join()
    assert isinstance(draws._work.outcome.exception(), BadRow), "found already, and not yet told"
    with pytest.raises(BadRow, match=r"^row 3: corrupt image"):
        draws.take(first.cursor, 1, bad_rows)
    draws.close()


@pytest.mark.parametrize(("mask", "num_processor_runs"), [(PATCHES, 1), (RAW, 2), (None, 1)])
def test_each_picture_is_decoded_once_and_not_kept(rows, monkeypatch, mask, num_processor_runs):
    decoded, processed = [], []
    real_decode = dataset.decode_image
    image_processor = type(rows._processor.image_processor)
    real_preprocess = image_processor.preprocess

    def decode(data, *limits):
        image = real_decode(data, *limits)
        decoded.append(weakref.ref(image))
        return image

    def preprocess(self, images, **rest):
        processed.append(len(images))
        return real_preprocess(self, images, **rest)

    monkeypatch.setattr(dataset, "decode_image", decode)
    monkeypatch.setattr(masking, "decode_image", decode)
    monkeypatch.setattr(image_processor, "preprocess", preprocess)
    draws = _open(rows, mask, num_steps=2)
    first = draws.take(FIRST, 0, BadRows("skip"))
    second = draws.take(first.cursor, 1, BadRows("skip"))
    num_images = sum(len(prompt.images) for prompt in first.prompts + second.prompts)
    assert num_images == 9 and len(decoded) == num_images
    assert sum(processed) == num_images * num_processor_runs
    assert not any(image() is not None for image in decoded)


def test_nothing_is_prepared_for_after_the_end(rows):
    draws = _open(rows, num_steps=2)
    first = draws.take(FIRST, 0, BadRows("skip"))
    assert draws._work is not None
    draws.take(first.cursor, 1, BadRows("skip"))
    assert draws._work is None
    on_the_spot = _open(rows, ahead=False)
    on_the_spot.take(FIRST, 0, BadRows("skip"))
    assert on_the_spot._work is None


def test_closing_ends_the_thread_after_the_prompt_at_hand(rows, monkeypatch):
    started, num_decoded = threading.Event(), []
    real = dataset.decode_image

    def slow(data, *limits):
        num_decoded.append(1)
        if len(num_decoded) > 2:  # the pictures of the first draw
            started.set()
            time.sleep(0.2)
        return real(data)

    monkeypatch.setattr(dataset, "decode_image", slow)
    draws = _open(rows, num_prompts=2)
    draws.take(FIRST.advance(4), 0, BadRows("skip"))
    thread = draws._work._thread
    assert thread.daemon
    assert started.wait(10)
    draws.close()
    assert not thread.is_alive() and len(num_decoded) == 3


def test_closing_leaves_a_thread_that_hangs(monkeypatch):
    released = threading.Event()

    def draw(cursor, *, bad_rows, cancelled=None):
        if cancelled is not None:
            released.wait()
        return draw_of_nothing

    draw_of_nothing = prefetch.Draw((), (), FIRST)
    monkeypatch.setattr(prefetch, "_CLOSE_S", 0.05)
    draws = Prefetch(draw, num_steps=9, ahead=True)
    draws.take(FIRST, 0, BadRows("skip"))
    start = time.monotonic()
    draws.close()
    assert time.monotonic() - start < 30, "it would wait for ever"
    released.set()


def test_tokenizers_in_use_elsewhere_do_not_disturb_it(rows, folder):
    """The run's own processor decodes, encodes and pads at the same time, as generator and evaluation may."""
    elsewhere, stop, done = load_processor(folder, DataConfig(instruction="")), threading.Event(), []
    response = elsewhere.encode_response("it is so")

    def use():
        while not stop.is_set():
            assert elsewhere.decode(response) == "it is so"
            elsewhere.tokenizer(["a", "longer"], padding=True, truncation=True, max_length=5)
            assert elsewhere.encode_response("it is so") == response
            elsewhere.encode("<image>what?", [Image.new("RGB", (56, 56))])
            done.append(1)

    wanted = _content(_open(rows, ahead=False).take(FIRST.advance(4), 1, BadRows("skip")))
    user = threading.Thread(target=use)
    user.start()
    try:
        for _ in range(20):
            draws = _open(rows)
            draws.take(FIRST, 0, BadRows("skip"))
            assert _content(draws.take(FIRST.advance(4), 1, BadRows("skip"))) == wanted
            draws.close()
    finally:
        stop.set()
        user.join()
    assert len(done) > 20
