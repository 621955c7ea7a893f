"""The parts of the GPU check, each run in a process of its own: what one does to the device ends with it.

With a GPU a part is forked from a server that has imported everything once and never touched the GPU; torch then has to
look for GPUs without CUDA, which does not survive a fork. Without one it is forked from this process.

A part's module has `run(options)`, which yields rows.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from benchmarks.gpu.apart import apart
from benchmarks.gpu.rows import Failed, GpuRow, Options, not_measured, reason_of, show_failure

PARTS = {
    "smoke": "Whether Transformer Engine and vLLM compute here",
    "checks": "The tests of the GPU paths",
    "update": "An update in bfloat16, against PAPO in plain PyTorch",
    "fp8": "An update in FP8",
    "head": "The language-model head",
    "attention": "Attention over shared prompts",
    "memory": "An update's memory: recomputation and the optimizer's moments",
    "handover": "Weights to vLLM, and its sleep",
    "rollouts": "Rollouts with vLLM",
}
"""Titles by the name of the module, in the order in which parts run: those that say most about the rest come first."""
USUAL_S = {
    "smoke": 60.0, "checks": 150.0, "update": 130.0, "fp8": 140.0, "head": 40.0, "attention": 60.0, "memory": 150.0,
    "handover": 130.0, "rollouts": 130.0,
}  # fmt: skip
"""Seconds that a part may take on one H100 with the model of 3B where time is short: guesses until each was seen."""
LIMIT_S = 540.0
"""Seconds that a part may take where time is not short; some machines end a command after ten minutes."""
UNFINISHED = "the rest of"
"""Beginning of the name of a part's last row when its process did not come to its end."""
_PRELOAD = ["torch", *(f"benchmarks.gpu.{name}" for name in PARTS)]
"""Modules that are imported once for all parts where parts are forked."""


def run_part(
    name: str, options: Options, limit_s: float = LIMIT_S, on_row: Callable[[GpuRow], None] = lambda row: None
) -> list[GpuRow]:
    """The part's rows, each given to `on_row` as it comes; where the process raised, died or took too long, the last
    says so."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # this process's, the server's and that of the parts
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a part forks others, which its threads would not survive
    multiprocessing.set_forkserver_preload(_PRELOAD)
    start = "forkserver" if torch.cuda.is_available() else "fork"
    options = replace(options, ends_at=time.monotonic() + limit_s)
    rows = []

    def take(row: GpuRow) -> None:
        rows.append(row)
        on_row(row)

    try:
        for row in apart(_rows, name, options, start=start, limit_s=limit_s):
            take(row)
    except (Failed, torch.OutOfMemoryError) as error:
        take(not_measured(f"{UNFINISHED} {name}", reason_of(error)))
    return rows


def _rows(name: str, options: Options) -> Iterator[GpuRow]:
    try:
        yield from importlib.import_module(f"benchmarks.gpu.{name}").run(options)
    except Exception as error:
        show_failure(error)
        yield not_measured(f"{UNFINISHED} {name}", reason_of(error))
