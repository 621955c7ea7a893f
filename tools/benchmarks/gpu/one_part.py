"""The parts of the GPU check, each run in a process of its own: what one does to the device ends with it.

With a GPU a part is forked from a server that has imported everything once and never touched the GPU; torch then has to
look for GPUs without CUDA, which does not survive a fork. Without one it is forked from this process.

A part's module has `run(options)`, which yields rows. They are written as they come, so that a process that dies, or
takes longer than it may, leaves what it had measured.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from tools.benchmarks.gpu.rows import GpuRow, Options, not_measured, reason_of

PARTS = {
    "checks": "The tests of the GPU paths",
    "update": "An update in bfloat16, against PAPO in plain PyTorch",
    "fp8": "An update in FP8",
    "memory": "An update's memory: recomputation and the optimizer's moments",
    "head": "The language-model head",
    "attention": "Attention over shared prompts",
    "rollouts": "Rollouts with vLLM",
    "handover": "Weights to vLLM, and its sleep",
}
"""By the name of the module, in the order in which they run."""
LIMIT_S = 540.0
"""Of a part: some machines end a command after ten minutes."""
UNFINISHED = "the rest of"
"""Begins the name of a part's last row when its process did not come to its end."""
_PRELOAD = ["torch", *(f"tools.benchmarks.gpu.{name}" for name in PARTS)]
"""Imported once for all parts where they are forked."""


def run_part(name: str, options: Options, limit_s: float = LIMIT_S) -> list[GpuRow]:
    """The part's rows; where its process raised, died or took too long, the last says so."""
    context = multiprocessing.get_context("forkserver" if torch.cuda.is_available() else "fork")
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # the server's and that of the parts
    multiprocessing.set_forkserver_preload(_PRELOAD)
    with TemporaryDirectory() as folder:
        out = Path(folder) / "rows.jsonl"
        out.touch()
        process = context.Process(target=_write_rows, args=(name, options, out))
        process.start()
        process.join(limit_s)
        reason = _why_it_ended(process, limit_s)
        rows = [GpuRow(**json.loads(line)) for line in out.read_text().splitlines()]
    return rows + ([not_measured(f"{UNFINISHED} {name}", reason)] if reason else [])


def _why_it_ended(process: multiprocessing.process.BaseProcess, limit_s: float) -> str:
    """Empty where it came to its end; a process that did not is killed."""
    if process.exitcode is None:
        process.kill()
        process.join()
        return f"took longer than {limit_s:.0f} s"
    if process.exitcode < 0:
        return f"its process was ended by {signal.Signals(-process.exitcode).name}"
    return f"its process ended with {process.exitcode}" if process.exitcode else ""


def _write_rows(name: str, options: Options, out: Path) -> None:
    from tools.benchmarks.quiet import quieten

    quieten()
    with out.open("a") as file:
        for row in _rows(name, options):
            file.write(json.dumps(asdict(row)) + "\n")
            file.flush()


def _rows(name: str, options: Options) -> Iterator[GpuRow]:
    try:
        yield from importlib.import_module(f"tools.benchmarks.gpu.{name}").run(options)
    except Exception as error:
        yield not_measured(f"{UNFINISHED} {name}", reason_of(error))
