"""An update with the perception term against PAPO in plain PyTorch on the same card: tokens/s, MFU, peak memory.

Both sides have the same weights, drawn on the device, and their log-probs are compared. Ours is bfloat16 with fp32
gradients, master weights and, without Transformer Engine, moments; the plain side has bfloat16 throughout and a fused
Adam, which is less work and less memory. One side comes after the other, each in a process of its own, so that each has
the card to itself; a ratio is that of their medians. Tokens count a prompt once a rollout, on both sides; MFU is of the
useful FLOPs (`megatron_papo.costs.flops`). Recomputation is the least that fits, and the plain side's batch the
largest.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from torch import Tensor

from benchmarks.floor import update_flops
from benchmarks.gpu.apart import Rows, apart
from benchmarks.gpu.clock import Side, in_turns, peaks
from benchmarks.gpu.fitting import device_bytes, least_that_fits, needed_by_mode
from benchmarks.gpu.folder import model_folder
from benchmarks.gpu.policy import PERCEPTION, batch, mean_gap, on_host, open_ours, workload
from benchmarks.gpu.rows import (
    GIB,
    NEEDS_GPU,
    Failed,
    GpuRow,
    Options,
    attempt,
    compared,
    not_measured,
    reason_of,
)
from benchmarks.gpu.transformers_side import SIZES, TINY_SIZES, Size, open_plain, try_out
from benchmarks.ours import Key
from benchmarks.rollouts import num_tokens
from megatron_papo.costs.hardware import peak_tflops
from megatron_papo.distributed.accelerator import device_name, has_gpu
from megatron_papo.types import Group

MFU_AIM = 50.0
_GAP_LIMIT = {True: 0.06, False: 1e-4}
"""Nats a token, mean: bfloat16 on both sides with a GPU, fp32 without."""


@dataclass(frozen=True)
class Figures:
    """What one side has measured, by kind of update."""

    logprobs: dict[Key, Tensor]
    """Log-probs of the first group, on the host."""
    seconds: dict[str, float]
    """Median seconds of an update."""
    peaks: dict[str, int]
    tokens: int


def run(options: Options) -> Iterator[GpuRow]:
    with model_folder(options.shape) as folder:
        yield from attempt("an update", lambda: _rows(folder, options))


def optimizer_settings() -> dict[str, Any]:
    """Moments in bfloat16 where they can be."""
    return {"optim__precision_aware": HAVE_TE and has_gpu()}


def mfu_rows(name: str, seconds: float, flops: int, fp8: bool = False) -> Iterator[GpuRow]:
    """Rows of the MFU relative to the device's peak in bfloat16 and, for an update in FP8, also to its peak in FP8. The
    latter is twice as high; attention, the head and layers that are left out of FP8 cannot reach it."""
    peak = peak_tflops(device_name(), "bfloat16")
    name = f"{name}: MFU of bfloat16's peak"
    if peak is None:
        yield not_measured(f"{name} / aim", f"the peak of {device_name()} is not known" if has_gpu() else NEEDS_GPU)
        return
    yield compared(f"{name} / aim", 100 * flops / seconds / (peak * 1e12), MFU_AIM, "%")
    peak = peak_tflops(device_name(), "fp8") if fp8 else None
    if peak is not None:
        yield GpuRow(name.replace("bfloat16", "FP8"), 100 * flops / seconds / (peak * 1e12), "%")


def _rows(folder: Path, options: Options) -> Iterator[GpuRow]:
    needed, groups = needed_by_mode(folder, options, **optimizer_settings()), batch(folder, options)
    mode, ours = yield from least_that_fits(
        _ours, needed, device_bytes(), folder, options, groups, needed, only=options.recompute
    )
    for size in TINY_SIZES if options.tiny else SIZES:
        try:
            yield from apart(_plain, folder, options, groups, ours, mode, size)
            return
        except torch.OutOfMemoryError:
            continue
        except Failed as error:  # of the baseline: ours stands without it
            yield not_measured("transformers", reason_of(error))
            return
    yield not_measured("transformers", "out of memory, with checkpointing too")


def _ours(folder: Path, options: Options, groups: list[Group], needed: dict[str, int], mode: str) -> Rows:
    """Each kind's figures as soon as it is measured; what was found."""
    name = f"recompute {mode}"
    with open_ours(folder, workload(options), model__recompute=mode, **optimizer_settings()) as ours:
        figures = Figures(on_host(ours.logprobs(groups[:1])), {}, {}, num_tokens(groups))
        for kind in PERCEPTION:
            _measure(figures, kind, partial(ours.update, kind, groups), options, "update, ours")
            yield GpuRow(f"{kind}, {name}", figures.tokens / figures.seconds[kind], "tokens/s")
            yield from mfu_rows(f"{kind}, {name}", figures.seconds[kind], update_flops(groups, kind, ours.run.shape))
        if figures.peaks:
            yield predicted_row(f"{PERCEPTION[-1]}, {name}", figures.peaks[PERCEPTION[-1]], needed[mode])
        else:
            yield not_measured(f"{PERCEPTION[-1]}, {name}: peak memory / by arithmetic", NEEDS_GPU)
    return figures


def predicted_row(name: str, peak: int, needed: int) -> GpuRow:
    return compared(f"{name}: peak memory / by arithmetic", peak / GIB, needed / GIB, "GiB")


def _plain(folder: Path, options: Options, groups: list[Group], ours: Figures, mode: str, size: Size) -> Rows:
    """First whether it computes what ours does; no row where it does not fit."""
    plain = open_plain(folder, size)
    gap, limit = mean_gap(ours.logprobs, plain.logprobs(groups[:1])), _GAP_LIMIT[has_gpu()]
    try_out(plain, groups)
    yield compared("log-probs, ours against transformers: mean gap / allowed", gap, limit, "nats")
    if not gap <= limit:
        yield not_measured("transformers", "the sides do not compute the same: their times mean nothing")
        return
    figures = Figures({}, {}, {}, num_tokens(groups))
    for kind in PERCEPTION:
        _measure(figures, kind, partial(plain.update, kind, groups), options, "update, transformers")
        name, speeds = f"{kind}, recompute {mode}", [each.tokens / each.seconds[kind] for each in (ours, figures)]
        yield compared(f"{name} / {size.name}", *speeds, "tokens/s")
        if figures.peaks:
            yield compared(
                f"{name}: peak memory / {size.name}", ours.peaks[kind] / GIB, figures.peaks[kind] / GIB, "GiB"
            )


def _measure(figures: Figures, kind: str, side: Side, options: Options, what: str) -> None:
    figures.peaks.update(peaks({kind: side}))
    figures.seconds[kind] = statistics.median(in_turns({kind: side}, options.rounds, what, warm_up=False).of[kind])
