"""An update with the perception term against PAPO in plain PyTorch on the same card: tokens/s, MFU, peak memory.

Both sides have the same weights, drawn on the device, and their log-probs are compared before anything is timed. Ours
is bfloat16 with fp32 gradients, master weights and, without Transformer Engine, moments; the plain side has bfloat16
throughout and a fused Adam, which is less work and less memory. Sides take turns where the device holds both, else one
comes after the other. Tokens count a prompt once a rollout, on both sides; MFU is of the useful FLOPs
(`megatron_papo.accounting`) against the peak in bfloat16. Recomputation is the least that fits,
and the plain side's batch the largest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron.core.extensions.transformer_engine import HAVE_TE
from torch import Tensor

from megatron_papo.accelerator import device_name, has_gpu
from megatron_papo.accounting import peak_tflops
from megatron_papo.data.processor import load_processor
from megatron_papo.model.shape import ModelShape
from megatron_papo.types import Group
from tools.benchmarks.floor import update_flops
from tools.benchmarks.gpu.clock import Side, held, in_turns, peak_row, peaks, rate_row
from tools.benchmarks.gpu.folder import model_folder
from tools.benchmarks.gpu.policy import PERCEPTION, mean_gap, open_ours, our_settings, workload
from tools.benchmarks.gpu.rows import (
    GIB,
    NEEDS_GPU,
    GpuRow,
    Options,
    attempt,
    compared,
    least_recompute,
    not_measured,
    reason_of,
    release,
)
from tools.benchmarks.gpu.transformers_side import fit_plain, fits_both, open_plain
from tools.benchmarks.ours import Key
from tools.benchmarks.plain_papo import PlainPapo
from tools.benchmarks.rollouts import make_groups, num_tokens
from tools.benchmarks.timing import Seconds

MFU_AIM = 50.0
_GAP_LIMIT = {True: 0.06, False: 1e-4}
"""Nats a token, mean: bfloat16 on both sides with a GPU, fp32 without."""


@dataclass(frozen=True)
class Found:
    """Of one side or both, by kind; the plain side's names begin with "plain "."""

    logprobs: dict[Key, Tensor]
    seconds: dict[str, list[float]]
    peaks: dict[str, int]
    plain: str = ""
    """How the plain side ran; empty when it is not among these."""
    gap: float = 0.0
    """Of the two sides' log-probs, mean, nats."""


def run(options: Options) -> Iterator[GpuRow]:
    with model_folder(options.shape) as folder:
        yield from attempt("an update", lambda: _rows(folder, options))


def optimizer_settings() -> dict[str, Any]:
    """Moments in bfloat16 where they can be."""
    return {"optim__precision_aware": HAVE_TE and has_gpu()}


def mfu_row(name: str, seconds: float, flops: int) -> GpuRow:
    """Of the device's peak in bfloat16, whatever it was computed in."""
    peak = peak_tflops(device_name(), "bfloat16")
    if peak is None:
        return not_measured(name, f"the peak of {device_name()} is not known" if has_gpu() else NEEDS_GPU)
    return compared(name, 100 * flops / seconds / (peak * 1e12), MFU_AIM, "%")


def _rows(folder: Path, options: Options) -> Iterator[GpuRow]:
    recompute, own = least_recompute(partial(_ours, folder, options), options.recompute)
    found = own
    if not own.plain:
        release()
        try:
            found = _plain_alone(folder, options, own)
        except Exception as error:  # of the baseline: ours stands without it
            yield not_measured("transformers", reason_of(error))
    if found.plain:
        limit = _GAP_LIMIT[has_gpu()]
        yield compared("log-probs, ours against transformers: mean gap / allowed", found.gap, limit, "nats")
        if not found.gap <= limit:
            yield not_measured("an update", "the sides do not compute the same: their times mean nothing")
            return
    yield from _figures(folder, options, found, recompute)


def _figures(folder: Path, options: Options, found: Found, recompute: str) -> Iterator[GpuRow]:
    groups, shape = _batch(folder, options), ModelShape.from_folder(folder / "model")
    seconds, tokens = Seconds(found.seconds), num_tokens(groups)
    for kind in PERCEPTION:
        name, plain, other = f"{kind}, recompute {recompute}", f"plain {kind}", found.plain
        if other:
            yield rate_row(seconds, f"{name} / {other}", kind, plain, tokens)
        else:
            yield GpuRow(name, tokens / seconds.median(kind), "tokens/s")
        yield mfu_row(f"{name}: MFU / aim", seconds.median(kind), update_flops(groups, kind, shape))
        if other or not has_gpu():
            yield peak_row(found.peaks, f"{name}: peak memory / {other}", kind, plain)
        else:
            yield GpuRow(f"{name}: peak memory", found.peaks[kind] / GIB, "GiB")


def _batch(folder: Path, options: Options) -> list[Group]:
    work = workload(options)
    data = our_settings(folder, PERCEPTION[0], work).data
    return make_groups(work, load_processor(folder / "model", data))


def _ours(folder: Path, options: Options, recompute: str) -> Found:
    """Both sides in turns where the device holds both, else ours alone."""
    groups = _batch(folder, options)
    settings = {"model__recompute": recompute, **optimizer_settings()}
    with open_ours(folder, workload(options), **settings) as ours:
        own: dict[str, Side] = {kind: partial(ours.update, kind, groups) for kind in PERCEPTION}
        logprobs = ours.logprobs(groups[:1])
        most = peaks(own)
        if not fits_both(ours):
            return Found(logprobs, in_turns(own, options.rounds, "update, ours").of, most)
        besides = held()
        plain = open_plain(folder, options)
        gap = mean_gap(logprobs, plain.logprobs(groups[:1]))
        name = fit_plain(plain, groups)
        others = _plain_sides(plain, groups)
        most |= peaks(others, besides)
        return Found(logprobs, in_turns(own | others, options.rounds, "update").of, most, name, gap)


def _plain_alone(folder: Path, options: Options, own: Found) -> Found:
    """What ours found, with what the plain side found after it."""
    groups, plain = _batch(folder, options), open_plain(folder, options)
    gap = mean_gap(own.logprobs, plain.logprobs(groups[:1]))
    name = fit_plain(plain, groups)
    sides = _plain_sides(plain, groups)
    most = own.peaks | peaks(sides)
    seconds = own.seconds | in_turns(sides, options.rounds, "update, transformers").of
    return Found(own.logprobs, seconds, most, name, gap)


def _plain_sides(plain: PlainPapo, groups: list[Group]) -> dict[str, Side]:
    return {f"plain {kind}": partial(plain.update, kind, groups) for kind in PERCEPTION}
