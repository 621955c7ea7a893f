"""What recomputation and smaller moments save of an update's memory, and what they cost in tokens/s.

PAPO joint, one policy at a time on the same batch; each is compared with the first, which keeps every activation and
has moments in fp32. A setting that does not fit the device is a row that says so; where the first does not, the others
stand alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tools.benchmarks.gpu.clock import in_turns, peak_row, peaks, rate_row
from tools.benchmarks.gpu.folder import model_folder
from tools.benchmarks.gpu.policy import open_ours, workload
from tools.benchmarks.gpu.rows import GIB, GpuRow, Options, attempt
from tools.benchmarks.rollouts import make_groups, num_tokens
from tools.benchmarks.timing import Seconds

KIND = "PAPO joint"
FIRST = "recompute none, moments in fp32"
SETTINGS: dict[str, dict[str, Any]] = {
    FIRST: {"model__recompute": "none"},
    "recompute selective": {"model__recompute": "selective"},
    "recompute full": {"model__recompute": "full"},
    "recompute full, moments in bfloat16": {"model__recompute": "full", "optim__precision_aware": True},
    "recompute none, moments in bfloat16": {"model__recompute": "none", "optim__precision_aware": True},
    "recompute full, half of the states on the host": {"model__recompute": "full", "optim__offload_fraction": 0.5},
}


@dataclass
class Found:
    """By setting, as far as it was measured."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)


def run(options: Options) -> Iterator[GpuRow]:
    found = Found()
    with model_folder(options.shape) as folder:
        for name in SETTINGS:
            yield from attempt(name, partial(_rows, folder, options, name, found))


def _rows(folder: Path, options: Options, name: str, found: Found) -> Iterator[GpuRow]:
    work = workload(options)
    with open_ours(folder, work, **SETTINGS[name]) as ours:
        groups = make_groups(work, ours.run.processor)
        sides = {name: partial(ours.update, KIND, groups)}
        found.peaks |= peaks(sides)
        found.seconds |= in_turns(sides, options.rounds, "update").of
    tokens, seconds = num_tokens(groups), Seconds(found.seconds)
    if name != FIRST and FIRST in found.seconds:
        yield rate_row(seconds, f"{name} / {FIRST}", name, FIRST, tokens)
        yield peak_row(found.peaks, f"{name}: peak memory / {FIRST}", name, FIRST)
    else:
        yield GpuRow(name, tokens / seconds.median(name), "tokens/s")
        if name in found.peaks:
            yield GpuRow(f"{name}: peak memory", found.peaks[name] / GIB, "GiB")
