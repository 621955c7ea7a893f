"""The weight hand-over from the shards of two ranks to whole tensors on each: buckets against one parameter at a time.

Over gloo, of a model of 42 M parameters in fp32 (quick: 5 M): what `generation.bucket_mib` buys. The engine's own
loading is left out, it is the same for all; `tools/benchmark.py gpu` times both together. By the clock, of rank 0.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.models import HIDDEN, LAYERS, write_model
from benchmarks.ours import settings
from benchmarks.rows import Row
from benchmarks.timing import measure
from megatron_papo.runtime.launch import Work, launch
from megatron_papo.training.session import Run, open_run
from megatron_papo.weights.transfer import hf_tensors

LAYOUTS = {"TP 2": {"parallel__tensor": 2}, "PP 2": {"parallel__pipeline": 2}}
SINGLE = "one parameter"
BUCKETS_MIB = {SINGLE: 0, "4 MiB": 4, "64 MiB": 64, "256 MiB": 256}


def run(quick: bool, rounds: int | None = None) -> list[Row]:
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(
            folder / "model", **({"hidden": HIDDEN, "layers": LAYERS} if quick else {"hidden": 512, "layers": 8})
        )
        for layout in LAYOUTS:
            out = folder / f"{layout}.json"
            args = (folder, layout, rounds or (1 if quick else 15), out)
            code = launch(Work("benchmarks.handover:on_rank", args, folder), 2)
            if code:
                raise SystemExit(code)
            rows += [Row(**row) for row in json.loads(out.read_text())]
    return rows


def on_rank(folder: Path, layout: str, rounds: int, out: Path) -> None:
    """Rank 0 writes the rows to `out`."""
    torch.set_num_threads(1)
    with open_run(settings(folder, "GRPO", run__dir=folder / f"run_{layout}", **LAYOUTS[layout])) as run:
        sides = {name: partial(_walk, run, mib * 2**20 + 1) for name, mib in BUCKETS_MIB.items()}
        num_bytes = min(walk() for walk in sides.values())  # the first walk of each is a warm-up
        shown = run.layout.rank == 0
        seconds = measure(sides, rounds, layout if shown else None, time.perf_counter)
        if shown:
            rows = []
            for side in list(sides)[1:]:
                name = f"{layout}: hand-over of {num_bytes / 1e6:.0f} MB in buckets of {side} / {SINGLE} at a time"
                own, other = (num_bytes / 1e9 / seconds.median(which) for which in (side, SINGLE))
                rows.append(Row(name, own, other, 1 / seconds.ratio(side, SINGLE), "GB/s"))
            out.write_text(json.dumps([asdict(row) for row in rows]))


def _walk(run: Run, bucket_bytes: int) -> int:
    """Hands all weights over and returns their bytes."""
    dist.barrier()
    return sum(tensor.nbytes for _, tensor in hf_tensors(run.policy, run.shape, bucket_bytes=bucket_bytes))
