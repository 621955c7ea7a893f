"""Inputs for `cpu_strong.yaml` and `cpu_weak.yaml`: a Qwen2.5-VL of five million random weights, and 64 questions.

    python examples/sweeps/cpu_inputs.py runs/sweeps/inputs

Nothing can be learnt from them; they are there to be computed on. The pictures are noise of 168 x 168 pixels.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

NUM_ROWS = 64
EDGE = 168
"""Pixels: 36 image tokens."""


def main(folder: Path) -> None:
    from benchmarks.models import write_model

    write_model(folder / "model")
    random = np.random.default_rng(0)
    with (folder / "rows.jsonl").open("w") as file:
        for row in range(NUM_ROWS):
            name = f"{row}.png"
            Image.fromarray(random.integers(0, 256, (EDGE, EDGE, 3), dtype=np.uint8)).save(folder / name)
            file.write(json.dumps({"problem": f"<image>what is {row}?", "answer": str(row), "images": [name]}) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main(Path(sys.argv[1]))
