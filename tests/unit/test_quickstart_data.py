"""The quickstart's pictures and questions, its tiny model's tokenizer."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from transformers import AutoProcessor

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES / "quickstart"))

import make_data  # noqa: E402
from families import FAMILIES  # noqa: E402

SIZES = {"reading": 200, "mixed": 400, "train": 120, "heldout": 120}
every_family = pytest.mark.parametrize("family", list(FAMILIES))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    paths = make_data.make_data(tmp_path_factory.mktemp("data"), seed=3, **SIZES)
    return {name: pyarrow.parquet.read_table(path).to_pylist() for name, path in paths.items()}


def grid_of(row: dict) -> tuple[int, ...]:
    return tuple(int(label) for label in load_digits().target[row["digits"]])


def test_no_digit_image_is_in_training_and_heldout(rows):
    train, heldout = make_data.split_digits(3)
    assert set(train.places_N) & set(heldout.places_N) == set()
    assert set(train.places_N) | set(heldout.places_N) == set(range(1797))
    used = {name: {place for row in rows[name] for place in row["digits"]} for name in rows}
    assert used["warmup"] <= set(train.places_N) and used["train"] <= set(train.places_N)
    assert used["heldout"] <= set(heldout.places_N)


def test_split_pools_share_no_pixels():
    """Two scans with the same pixels would leak, whatever their places."""
    train, heldout = make_data.split_digits(0)
    seen = {pixels.tobytes() for pixels in train.pixels_NHW}
    assert not any(pixels.tobytes() in seen for pixels in heldout.pixels_NHW)


def test_answers_by_hand():
    grid = (3, 7, 1, 7)
    found = {}
    rng = np.random.default_rng(0)
    for _ in range(400):
        question = make_data.ask(grid, rng)
        found[question.text] = (question.answer, question.working)
    assert found["how many 7s?"] == (2, "7 7")
    assert found["how many 3s?"] == (1, "3")
    assert found["how many 5s?"] == (0, "none")
    assert found["largest digit?"] == (7, "7")
    assert found["which digit is bottom left?"] == (1, "1")
    assert found["sum of the top row?"] == (10, "3 + 7")
    assert found["sum of the bottom row?"] == (8, "1 + 7")


@every_family
def test_pictures_show_the_digits_they_name(tmp_path, family):
    """The nearest training digit of each cell of a held-out picture has the answer's label, nearly always."""
    edge = FAMILIES[family].token_edge
    train, _ = make_data.split_digits(3, family)
    known = train.pixels_NHW.reshape(len(train.labels_N), -1).astype(float)
    path = make_data.make_data(tmp_path, seed=3, family=family, reading=0, mixed=0, train=1, heldout=40)["heldout"]
    right = 0
    for row in pyarrow.parquet.read_table(path).to_pylist():
        picture = np.asarray(Image.open(io.BytesIO(row["images"][0])))
        assert picture.shape == (2 * edge, 2 * edge)
        for place, label in enumerate(grid_of(row)):
            top, left = place // 2 * edge + 2, place % 2 * edge + 2
            cell = picture[top : top + edge - 4, left : left + edge - 4].reshape(-1).astype(float)
            right += int(train.labels_N[((known - cell) ** 2).sum(1).argmin()] == label)
    assert right >= 0.95 * 160


def test_demonstrations_read_then_some_guess(rows):
    reading, mixed = rows["warmup"][:200], rows["warmup"][200:]
    for row in reading:
        numbers = " ".join(map(str, grid_of(row)))
        assert row["response"].startswith(f"<think> {numbers} so ")
        assert row["response"].endswith(f" </think> \\boxed{{ {row['answer']} }}")
    guesses = np.mean(["guess" in row["response"] for row in mixed])
    unboxed = np.mean(["boxed" not in row["response"] for row in mixed])
    assert abs(guesses - make_data.GUESSES) < 0.08 and abs(unboxed - make_data.UNBOXED) < 0.05
    lucky = np.mean([row["response"].endswith(f"{{ {row['answer']} }}") for row in mixed if "guess" in row["response"]])
    assert lucky < 0.5


def test_same_seed_same_rows_other_seed_others(tmp_path, rows):
    again = make_data.make_data(tmp_path / "again", seed=3, **SIZES)
    other = make_data.make_data(tmp_path / "other", seed=4, **SIZES)
    for name in rows:
        assert pyarrow.parquet.read_table(again[name]).to_pylist() == rows[name]
        assert pyarrow.parquet.read_table(other[name]).to_pylist() != rows[name]


def test_another_family_changes_the_pictures_alone(tmp_path, rows):
    larger = make_data.make_data(tmp_path, seed=3, family="qwen3_vl", **SIZES)
    for name, path in larger.items():
        for row, other in zip(pyarrow.parquet.read_table(path).to_pylist(), rows[name], strict=True):
            assert row.pop("images") != other["images"]
            assert row.items() <= other.items()


@every_family
def test_a_digit_is_one_image_token(tmp_path, family):
    """The model folder's processor takes the family's pictures as they are: 2 x 2 image tokens of 2 x 2 patches."""
    import make_model

    folder = make_model.make_model(tmp_path / "model", family=family)
    processor = AutoProcessor.from_pretrained(folder)
    data = make_data.make_data(tmp_path / "data", family=family, reading=0, mixed=0, train=1, heldout=1)
    row = pyarrow.parquet.read_table(data["train"]).to_pylist()[0]
    with Image.open(io.BytesIO(row["images"][0])) as picture:
        inputs = processor.image_processor(images=[picture.convert("RGB")], return_tensors="np")
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 4]]
    sizes = [tensor.numel() for tensor in load_file(folder / "model.safetensors").values()]
    assert 0.9e6 < sum(sizes) < 1.1e6


def test_tokenizer_knows_every_word(rows):
    import make_model

    tokenizer = make_model.build_tokenizer()
    unknown = tokenizer.convert_tokens_to_ids("<unk>")
    texts = [row["problem"].removeprefix("<image>") for name in rows for row in rows[name]]
    texts += [row["response"] for row in rows["warmup"]]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert unknown not in ids and len(ids) <= 16
    response = rows["warmup"][0]["response"]
    assert tokenizer.decode(tokenizer(response)["input_ids"]) == response
