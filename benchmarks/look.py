"""What the first look at a model's weights costs (`megatron_papo/weights/first_look.py`), beside their load.

A model of random weights in fp32, 2.8 GB, on one rank, its files in the page cache: nothing hides behind a disk.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.models import HIDDEN, LAYERS, write_model
from benchmarks.ours import settings
from benchmarks.rows import Row
from benchmarks.timing import measure
from megatron_papo.checkpoint.weight_loading import load_weights
from megatron_papo.runtime.launch import Work, launch
from megatron_papo.training.session import open_run
from megatron_papo.weights.first_look import look
from megatron_papo.weights.held import held_parameters

ROUNDS = 7


def run(quick: bool, rounds: int | None = None) -> list[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder, out = Path(name), Path(name) / "row.json"
        write_model(folder / "model", hidden=HIDDEN if quick else 8 * HIDDEN, layers=LAYERS if quick else 16)
        work = Work("benchmarks.look:on_rank", (folder, rounds or (1 if quick else ROUNDS), out), folder)
        if code := launch(work, 1):
            raise SystemExit(code)
        return [Row(**json.loads(out.read_text()))]


def on_rank(folder: Path, rounds: int, out: Path) -> None:
    """Measures load and check in turns, in processor seconds, and writes the row to `out`."""
    torch.set_num_threads(1)
    with open_run(settings(folder, "GRPO", run__dir=folder / "run")) as run:
        parameters = held_parameters(run.policy, run.shape, 1)
        sides = {
            "load": lambda: load_weights(run.policy, run.shape, folder / "model"),
            "look": lambda: look(folder / "model", run.shape, parameters, 0),
        }
        seconds = measure(sides, rounds, "weights")
    num_bytes = sum(part.tensor.numel() * part.tensor.element_size() for part in parameters.values())
    name = f"the first look at {num_bytes / 1e9:.1f} GB of weights / their load"
    row = Row(name, seconds.median("look"), seconds.median("load"), seconds.ratio("look", "load"), "s")
    out.write_text(json.dumps(asdict(row)))
