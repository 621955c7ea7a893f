"""Stands for your own data in docs/first_day.md: two files of questions about drawn pictures, and a held-out one.

    python examples/first_day/make_rows.py data/first_day

writes squares.jsonl, many.jsonl and heldout.jsonl, JSON lines with the pictures as files beside them. One row of
squares.jsonl is bad on purpose: its picture is missing.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_papo.runtime.needed_packages import check_packages

check_packages()

from examples.data_source.squares import rows

SYSTEM = "You count what is in a picture."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    write(folder, "squares", number=120, most=3)
    write(folder, "many", number=60, most=9)
    write(folder, "heldout", number=40, most=9)
    (folder / "squares_7.png").unlink()


def write(folder: Path, name: str, *, number: int, most: int) -> None:
    """`number` rows as `name`.jsonl, the picture of row 5 as `name`_5.png."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, row in enumerate(rows(name, number=number, most=most)):
        picture = folder / f"{name}_{index}.png"
        picture.write_bytes(row["images"][0])
        # no <image> in the question: the pictures then come first
        question = {"problem": "How many squares are there?", "answer": row["answer"], "images": [picture.name]}
        lines.append(json.dumps({**question, "squares": row["squares"], "system": SYSTEM}))
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
