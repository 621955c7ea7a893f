"""Seconds and peak memory of several sides on this machine's device, in turns, after a warm-up.

On a GPU the clock is read when the device has done all that it was given, before and after each side: what a region
takes from its first launch to its last kernel. Regions of less than a millisecond are repeated within one reading.
Peaks are of the GPU's memory; without one there are none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from benchmarks.gpu.rows import GIB, NEEDS_GPU, GpuRow, compared, not_measured, release
from benchmarks.timing import Seconds, measure
from megatron_papo.distributed.accelerator import has_gpu, peak_memory, reset_peak_memory

Side = Callable[[], object]


def in_turns(sides: Mapping[str, Side], rounds: int, what: str, warm_up: bool = True) -> Seconds:
    """Every side once to warm up, where `peaks` has not done that, then once a round."""
    for side in sides.values() if warm_up else ():
        side()
    return measure(sides, rounds, what, clock)


def clock() -> float:
    if has_gpu():
        torch.cuda.synchronize()
    return time.perf_counter()


def repeated(side: Side, times: int) -> Side:
    def run() -> None:
        for _ in range(times):
            side()

    return run


def held() -> int:
    """Bytes of the GPU that tensors of this process take."""
    return torch.cuda.memory_allocated() if has_gpu() else 0


def peaks(sides: Mapping[str, Side], besides: int = 0) -> dict[str, int]:
    """Most bytes of the GPU that tensors took during each side, after it has run once, without the bytes `besides`
    that others hold all the while; nothing without a GPU."""
    most_bytes = {}
    for name, side in sides.items() if has_gpu() else ():
        side()
        release()
        reset_peak_memory()
        side()
        clock()
        most_bytes[name] = peak_memory() - besides
    return most_bytes


def rate_row(seconds: Seconds, name: str, side: str, baseline: str, tokens: int) -> GpuRow:
    row, _ = seconds.rows(name, side, baseline, tokens)
    return GpuRow(row.name, row.value, row.unit, row.baseline, row.ratio)


def peak_row(most_bytes: Mapping[str, int], name: str, side: str, baseline: str) -> GpuRow:
    if side not in most_bytes or baseline not in most_bytes:
        return not_measured(name, NEEDS_GPU)
    return compared(name, most_bytes[side] / GIB, most_bytes[baseline] / GIB, "GiB")
