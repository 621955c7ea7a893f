"""A data source of one's own: pictures of squares, drawn as they are asked for, with the question how many there are.

`data.train: [{function: examples.data_source.squares:rows, options: {number: 200}}]` reads them (`train.yaml` beside
this file). `papo` finds the module when it is started in the folder that holds `examples`.
"""

from __future__ import annotations

import io
import random
from typing import Any

from PIL import Image, ImageDraw

SIDE, CELL = 56, 14
PAPER, INK = 235, 20  # gray values


def rows(split: str, *, number: int, most: int = 4, seed: int = 0) -> list[dict[str, Any]]:
    """`number` rows with 1 to `most` squares. Their random numbers come from the split and `seed` alone, since every
    rank calls this and must get the same rows."""
    dice = random.Random(f"{split} {seed}")
    return [_row(dice, dice.randint(1, most)) for _ in range(number)]


def is_easy(row: dict[str, Any]) -> bool:
    """For `filter: examples.data_source.squares:is_easy`: few squares."""
    return bool(row["squares"] <= 2)


def _row(dice: random.Random, squares: int) -> dict[str, Any]:
    picture = Image.new("L", (SIDE, SIDE), PAPER)
    places = [(left, top) for top in range(0, SIDE, CELL) for left in range(0, SIDE, CELL)]
    for left, top in dice.sample(places, squares):
        ImageDraw.Draw(picture).rectangle((left + 2, top + 2, left + CELL - 3, top + CELL - 3), fill=INK)
    packed = io.BytesIO()
    picture.save(packed, "PNG")
    return {
        "problem": "<image>How many squares are there?",
        "answer": str(squares),
        "images": [packed.getvalue()],
        "squares": squares,
    }
