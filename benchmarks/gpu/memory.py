"""What recomputation and smaller moments save of an update's memory, and what they cost in tokens/s.

PAPO joint, one policy at a time on the same batch, each in a process of its own, what needs least memory first, so that
a time that is short has figures. Each peak stands beside what `papo check` counts, and each is compared with the
setting that keeps every activation and has moments in fp32, where that fits. What cannot fit by arithmetic is not
tried; both that and what runs out of memory are rows that say so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu.apart import Rows, apart
from benchmarks.gpu.clock import in_turns, peak_row, peaks, rate_row
from benchmarks.gpu.fitting import MODES, cannot_fit, device_bytes, needed_bytes
from benchmarks.gpu.folder import model_folder
from benchmarks.gpu.policy import batch, open_ours, workload
from benchmarks.gpu.rows import NEEDS_GPU, GpuRow, Options, attempt, not_measured
from benchmarks.gpu.update import predicted_row
from benchmarks.rollouts import num_tokens
from benchmarks.timing import Seconds
from megatron_papo.types import Group

KIND = "PAPO joint"
FIRST = f"recompute {MODES[0]}, moments in fp32"
_HALF = "recompute full, half of the states on the host"
SETTINGS: dict[str, dict[str, Any]] = {
    FIRST: {"model__recompute": MODES[0]},
    **{f"recompute {mode}": {"model__recompute": mode} for mode in MODES[1:]},
    **{
        f"recompute {mode}, moments in bfloat16": {"model__recompute": mode, "optim__precision_aware": True}
        for mode in MODES
    },
    _HALF: {"model__recompute": "full", "optim__offload_fraction": 0.5},
}
_QUICK = (FIRST, "recompute full", "recompute full, moments in bfloat16", _HALF)
"""What is measured in a quick run."""


@dataclass
class Figures:
    """What has been measured so far, by the name of the settings."""

    tokens: int
    """Number of tokens of an update."""
    seconds: dict[str, list[float]] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)


def run(options: Options) -> Iterator[GpuRow]:
    with model_folder(options.shape) as folder:
        has, groups = device_bytes(), batch(folder, options)
        figures, names = Figures(num_tokens(groups)), _QUICK if options.quick else tuple(SETTINGS)
        needed = {name: needed_bytes(folder, options, **SETTINGS[name]) for name in names}
        for name in sorted(names, key=lambda name: needed[name]):
            reason = cannot_fit(needed[name], has) if has or not _wants_gpu(name) else NEEDS_GPU
            if reason:
                yield not_measured(name, reason)
            else:
                yield from attempt(name, partial(_rows, folder, options, groups, name, needed[name], figures))
    yield from _compared(figures)


def _wants_gpu(name: str) -> bool:
    """Whether `megatron_papo.optimization.optimizer` refuses these settings without a GPU."""
    return any(key.startswith("optim__") for key in SETTINGS[name])


def _rows(
    folder: Path, options: Options, groups: list[Group], name: str, needed: int, figures: Figures
) -> Iterator[GpuRow]:
    figures.seconds[name], peak = yield from apart(_measure, folder, options, groups, name, needed)
    figures.peaks |= peak


def _measure(folder: Path, options: Options, groups: list[Group], name: str, needed: int) -> Rows:
    with open_ours(folder, workload(options), **SETTINGS[name]) as ours:
        sides = {name: partial(ours.update, KIND, groups)}
        most = peaks(sides)
        for peak in most.values():
            yield predicted_row(name, peak, needed)
        seconds = in_turns(sides, options.rounds, "update", warm_up=False)
        yield GpuRow(name, num_tokens(groups) / seconds.median(name), "tokens/s")
    return seconds.of[name], most


def _compared(figures: Figures) -> Iterator[GpuRow]:
    """Beside the first setting, where that was measured."""
    for name in figures.seconds:
        if name != FIRST and FIRST in figures.seconds:
            yield rate_row(Seconds(figures.seconds), f"{name} / {FIRST}", name, FIRST, figures.tokens)
            yield peak_row(figures.peaks, f"{name}: peak memory / {FIRST}", name, FIRST)
