"""A whole training run small enough for tests: a tiny model, questions about drawn pictures, a reward of bytes."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megatron_papo.config import Config, load_config
from tests.support.metric_names import undocumented
from tests.support.tiny import make_tiny_folder

OVERRIDES = {
    "run.seed": 3,
    "model.dtype": "float32",
    "data.instruction": "",
    "data.min_pixels": 28 * 28,
    "data.max_pixels": 112 * 112,
    "generation.max_response_tokens": 6,
    "generation.top_p": 1.0,
    "reward.function": "tests.support.tiny_run:share_of_even_bytes",
    "train.steps": 2,
    "train.prompts_per_step": 4,
    "train.group_size": 3,
    "train.updates_per_step": 2,
    "train.tokens_per_micro_batch": 200,
    "optim.lr": 1e-3,
    "checkpoint.save_every": 0,
    "checkpoint.export_at_end": False,
    "observe.console": False,
    "observe.tensorboard": False,
    "certify.at_start": False,
    "certify.after_hand_over": False,
}
"""No certificate: tests of it ask for one, and it takes a quarter of the time of so small a run."""
CERTIFIED = {"certify__at_start": True, "certify__after_hand_over": True}


def share_of_even_bytes(response: str, answer: str, problem: str) -> float:
    """A reward that random weights get some of, unequal within a group."""
    values = response.encode()
    return sum(byte % 2 == 0 for byte in values) / max(len(values), 1)


def make_inputs(folder: Path, make_folder: Callable[..., Path] = make_tiny_folder, **model: Any) -> Path:
    """`folder`/model and `folder`/rows.jsonl: one picture, several of odd sizes, and none.

    `make_folder` writes the model, and `model` are its arguments.
    """
    folder.mkdir(parents=True, exist_ok=True)
    make_folder(folder / "model", **model)
    random = np.random.default_rng(0)
    rows = []
    for row, sizes in enumerate(
        [[(56, 56)], [(70, 33)], [], [(56, 84), (31, 57)], [(112, 28)], [(40, 40)], [], [(84, 56)]]
    ):
        images = []
        for index, (width, height) in enumerate(sizes):
            pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
            images.append(f"{row}_{index}.png")
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            (folder / images[-1]).write_bytes(buffer.getvalue())
        question = "<image>" * len(sizes) + f"what is {row}?"
        rows.append({"problem": question, "answer": str(row), "images": images, "response": f"it is {row}"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def tiny_run(inputs: Path, run_dir: Path, recipe: Path | None = None, **settings: Any) -> Config:
    """The settings of a run on `make_inputs`, over those of `recipe`; `settings` are keys with `__` for the dot."""
    paths = {"run.dir": run_dir, "model.path": inputs / "model", "data.train": inputs / "rows.jsonl"}
    wanted = {**OVERRIDES, **paths, **{key.replace("__", "."): value for key, value in settings.items()}}
    return load_config(recipe, [f"{key}={value}" for key, value in wanted.items()])


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """What every step recorded, without the clock's readings and what is divided by them, memory, how much of the
    work the layout made, and what certificates found. Every name stands in docs/metrics.md."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert not (names := undocumented({name for line in lines for name in line})), f"not in docs/metrics.md: {names}"
    left_out = (
        "time/",
        "unix_time",
        "tokens_",
        "tflops_per_gpu",
        "mfu",
        "mfu_fp8",
        "memory/",
        "memory_gib/",
        "flops/",
        "checkpoints_",
        "certify/",
        "planned/",
        "ranks",
    )
    return [{name: value for name, value in line.items() if not name.startswith(left_out)} for line in lines]
