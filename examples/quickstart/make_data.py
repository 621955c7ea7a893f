"""Pictures of four real handwritten digits, with questions that can only be answered by reading them.

Every picture is a 2 x 2 grid of scikit-learn's `load_digits` images (8 x 8 pixels, scanned from real forms), each
enlarged to fill a cell of what one image token of the family covers: 28 x 28 pixels of Qwen2.5-VL, 32 x 32 of Qwen3-VL.
The digit images are split into training and held-out ones before any picture is composed, so no held-out picture shows
a digit image seen in training.

Three parquet files come out, with `problem`, `answer`, `images` (PNG bytes) and `digits` (places in `load_digits`):
  warmup.parquet    with `response`, a demonstration, for `papo sft` in this order: rows that read the grid before they
                    answer, then rows of which a part only guesses. Looking first is what is left to reinforce.
  train.parquet     prompts alone, for `papo train`
  heldout.parquet   prompts alone, composed of held-out digit images, for `papo eval`
"""

from __future__ import annotations

import argparse
import io
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_papo.runtime.needed_packages import check_packages

check_packages()

import numpy as np
import pyarrow
import pyarrow.parquet
from families import DEFAULT, FAMILIES
from PIL import Image
from sklearn.datasets import load_digits

MARGIN = 2  # pixels between a digit and the edge of its cell
PAPER, INK = 235, 20  # gray values
NUM_HELDOUT_DIGITS = 297  # of 1797; the others are for training
REPEAT = 0.35  # how often a digit repeats one that is already in the picture, so that there is something to count
GUESSES, UNBOXED = 0.6, 0.1  # shares of the last part of the warm-up: answers without looking, answers without a box
Grid = tuple[int, int, int, int]  # digits in reading order: top left, top right, bottom left, bottom right


@dataclass(frozen=True)
class Digits:
    """A pool of digit images."""

    places_N: np.ndarray
    """[N] places in `load_digits`."""
    labels_N: np.ndarray
    """[N] the digits, 0 to 9."""
    pixels_NHW: np.ndarray
    """[N, H, W] uint8, dark ink on light paper; the cell of a digit is `MARGIN` larger on each side."""


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    working: str
    """What is read off the grid, before the answer."""
    answer: int


def split_digits(seed: int, family: str = DEFAULT) -> tuple[Digits, Digits]:
    """(training pool, held-out pool), in the size that suits the family: no digit image is in both."""
    raw = load_digits()
    order_N = np.random.default_rng([seed, 0]).permutation(len(raw.target))
    edge = FAMILIES[family].token_edge - 2 * MARGIN

    def pool(places_N: np.ndarray) -> Digits:
        pixels = [_enlarge(raw.images[place], edge) for place in places_N]
        return Digits(places_N, raw.target[places_N], np.stack(pixels))

    return pool(order_N[NUM_HELDOUT_DIGITS:]), pool(order_N[:NUM_HELDOUT_DIGITS])


def _enlarge(ink_88: np.ndarray, edge: int) -> np.ndarray:
    """[edge, edge] gray values of an [8, 8] image that counts ink from 0 to 16."""
    gray_88 = (PAPER - ink_88 / 16 * (PAPER - INK)).astype(np.uint8)
    return np.asarray(Image.fromarray(gray_88).resize((edge, edge), Image.Resampling.BILINEAR))


def draw_digits(pool: Digits, rng: np.random.Generator) -> np.ndarray:
    """[4] indices into the pool."""
    drawn: list[int] = []
    while len(drawn) < 4:
        index = int(rng.integers(len(pool.labels_N)))
        if drawn and rng.random() < REPEAT:
            same_label = np.flatnonzero(pool.labels_N == pool.labels_N[rng.choice(drawn)])
            index = int(rng.choice(same_label))
        drawn.append(index)
    return np.array(drawn)


def paint(pixels_4HW: np.ndarray, shifts_42: np.ndarray | None = None) -> Image.Image:
    """The picture, 2 x 2 cells, gray; `shifts_42` moves each digit in its cell (pixels down, right; up to MARGIN)."""
    edge = pixels_4HW.shape[-1]
    cell = edge + 2 * MARGIN
    picture = np.full((2 * cell, 2 * cell), PAPER, dtype=np.uint8)
    for place, pixels_HW in enumerate(pixels_4HW):
        down, right = (0, 0) if shifts_42 is None else shifts_42[place]
        top, left = place // 2 * cell + MARGIN + down, place % 2 * cell + MARGIN + right
        picture[top : top + edge, left : left + edge] = pixels_HW
    return Image.fromarray(picture)


def ask(grid: Grid, rng: np.random.Generator) -> Question:
    """A question about the grid, of one of four kinds."""
    kind = ("count", "largest", "place", "sum")[rng.integers(4)]
    if kind == "count":
        # Mostly a digit that is there, else the answer would nearly always be 0.
        digit = int(rng.choice(grid)) if rng.random() < 0.8 else int(rng.integers(10))
        found = [str(digit)] * grid.count(digit)
        return Question(kind, f"how many {digit}s?", " ".join(found) or "none", len(found))
    if kind == "largest":
        return Question(kind, "largest digit?", str(max(grid)), max(grid))
    if kind == "place":
        index = int(rng.integers(4))
        name = ("top left", "top right", "bottom left", "bottom right")[index]
        return Question(kind, f"which digit is {name}?", str(grid[index]), grid[index])
    row, (left, right) = (("top", grid[:2]), ("bottom", grid[2:]))[rng.integers(2)]
    return Question(kind, f"sum of the {row} row?", f"{left} + {right}", left + right)


def demonstrate(grid: Grid, question: Question, boxed: bool = True) -> str:
    """An answer that reads the grid first."""
    answer = f"\\boxed{{ {question.answer} }}" if boxed else str(question.answer)
    return f"<think> {' '.join(map(str, grid))} so {question.working} </think> {answer}"


def guess(answer: int) -> str:
    """An answer that does not look."""
    return f"<think> a guess </think> \\boxed{{ {answer} }}"


class Maker:
    """Makes rows from one pool of digits, with one stream of random numbers."""

    def __init__(self, pool: Digits, seed: int, stream: int, augment: bool = False) -> None:
        self._pool = pool
        self._rng = np.random.default_rng([seed, stream])
        self._augment = augment
        self._answers: dict[str, list[int]] = {}
        """Answers seen so far by kind of question: what a guess is drawn from."""

    def prompts(self, count: int) -> list[dict]:
        return [self._row()[0] for _ in range(count)]

    def demonstrations(self, count: int, *, guesses: float = 0.0, unboxed: float = 0.0) -> list[dict]:
        """Rows with a response; `guesses` and `unboxed` are the shares of those kinds of response."""
        rows = []
        for _ in range(count):
            row, grid, question = self._row()
            seen = self._answers.setdefault(question.kind, [])
            seen.append(question.answer)
            draw = self._rng.random()
            if draw < guesses:
                response = guess(seen[self._rng.integers(len(seen))])
            else:
                response = demonstrate(grid, question, boxed=draw >= guesses + unboxed)
            rows.append({**row, "response": response})
        return rows

    def _row(self) -> tuple[dict, Grid, Question]:
        drawn_4 = draw_digits(self._pool, self._rng)
        shifts_42 = self._rng.integers(-MARGIN, MARGIN + 1, (4, 2)) if self._augment else None
        top_left, top_right, bottom_left, bottom_right = (int(label) for label in self._pool.labels_N[drawn_4])
        grid = (top_left, top_right, bottom_left, bottom_right)
        question = ask(grid, self._rng)
        png = io.BytesIO()
        paint(self._pool.pixels_NHW[drawn_4], shifts_42).save(png, "PNG", compress_level=1)
        row = {
            "problem": f"<image>{question.text}",
            "answer": str(question.answer),
            "images": [png.getvalue()],
            "digits": self._pool.places_N[drawn_4].tolist(),
        }
        return row, grid, question


def make_data(
    folder: Path,
    seed: int = 0,
    *,
    family: str = DEFAULT,
    reading: int = 25_600,
    mixed: int = 2_560,
    train: int = 4_000,
    heldout: int = 300,
) -> dict[str, Path]:
    """Writes the three files (numbers of rows as given; same seed, same bytes) and returns their paths by name.

    `family`, a key of `FAMILIES`, decides how large the pictures are; digits and questions are the same for all.
    """
    training_pool, heldout_pool = split_digits(seed, family)
    warmup = Maker(training_pool, seed, 1, augment=True)
    rows = {
        "warmup": warmup.demonstrations(reading) + warmup.demonstrations(mixed, guesses=GUESSES, unboxed=UNBOXED),
        "train": Maker(training_pool, seed, 2).prompts(train),
        "heldout": Maker(heldout_pool, seed, 3).prompts(heldout),
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.parquet" for name in rows}
    for name, path in paths.items():
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[name]), path)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--family", choices=list(FAMILIES), default=DEFAULT)
    arguments = parser.parse_args()
    for path in make_data(arguments.folder, arguments.seed, family=arguments.family).values():
        print(path)


if __name__ == "__main__":
    main()
