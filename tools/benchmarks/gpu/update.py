"""An update with the perception term against PAPO in plain PyTorch on the same card: tokens/s, MFU, peak memory.

Both sides have the same weights, drawn on the device, and their log-probs are compared before anything is timed. Ours
is bfloat16 with fp32 gradients, master weights and, without Transformer Engine, moments; the plain side has bfloat16
throughout and a fused Adam, which is less work and less memory. Sides take turns where the device holds both, else one
comes after the other. Tokens count a prompt once a rollout, on both sides; MFU is of the useful FLOPs
(`megatron_papo.accounting`) against the peak in bfloat16. Recomputation is the least that fits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron.core.extensions.transformer_engine import HAVE_TE

from megatron_papo.accelerator import device_name, has_gpu
from megatron_papo.accounting import peak_tflops
from megatron_papo.types import Group
from tools.benchmarks.floor import update_flops
from tools.benchmarks.gpu.clock import Side, held, in_turns, peak_row, peaks, rate_row
from tools.benchmarks.gpu.folder import model_folder
from tools.benchmarks.gpu.policy import (
    PERCEPTION,
    fits_both,
    mean_gap,
    open_ours,
    open_plain,
    plain_attention,
    workload,
)
from tools.benchmarks.gpu.rows import (
    NEEDS_GPU,
    GpuRow,
    Options,
    attempt,
    compared,
    least_recompute,
    not_measured,
    release,
)
from tools.benchmarks.plain_papo import PlainPapo
from tools.benchmarks.rollouts import make_groups, num_tokens
from tools.benchmarks.timing import Seconds

MFU_AIM = 50.0
_GAP_LIMIT = {True: 0.06, False: 1e-4}
"""Nats a token, mean: bfloat16 on both sides with a GPU, fp32 without."""


@dataclass(frozen=True)
class Both:
    """What the two sides made of one batch; the plain side's names begin with "plain "."""

    gap: float
    """Of their log-probs, mean, nats."""
    seconds: Seconds
    peaks: dict[str, int]
    tokens: int
    flops: dict[str, int]
    """Useful ones of an update, by kind."""


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
    recompute, both = least_recompute(partial(_measure, folder, options))
    other, limit = f"transformers, {plain_attention()}", _GAP_LIMIT[has_gpu()]
    yield compared(f"log-probs, ours against {other}: mean gap / allowed", both.gap, limit, "nats")
    if not both.gap <= limit:
        yield not_measured("an update", "the sides do not compute the same: their times mean nothing")
        return
    for kind in PERCEPTION:
        name, plain = f"{kind}, recompute {recompute}", f"plain {kind}"
        yield rate_row(both.seconds, f"{name} / {other}", kind, plain, both.tokens)
        yield mfu_row(f"{name}: MFU / aim", both.seconds.median(kind), both.flops[kind])
        yield peak_row(both.peaks, f"{name}: peak memory / {other}", kind, plain)


def _measure(folder: Path, options: Options, recompute: str) -> Both:
    work = workload(options)
    with open_ours(folder, work, model__recompute=recompute, **optimizer_settings()) as ours:
        groups = make_groups(work, ours.run.processor)
        own: dict[str, Side] = {kind: partial(ours.update, kind, groups) for kind in PERCEPTION}
        flops = {kind: update_flops(groups, kind, ours.run.shape) for kind in PERCEPTION}
        logprobs = ours.logprobs(groups[:1])
        most = peaks(own)
        if fits_both(ours):
            besides = held()
            plain = open_plain(folder, options)
            gap = mean_gap(logprobs, plain.logprobs(groups[:1]))
            sides = _plain_sides(plain, groups)
            most |= peaks(sides, besides)
            seconds = in_turns(own | sides, options.rounds, "update")
            return Both(gap, seconds, most, num_tokens(groups), flops)
        seconds = in_turns(own, options.rounds, "update, ours")
    del ours, own
    release()
    plain = open_plain(folder, options)
    gap = mean_gap(logprobs, plain.logprobs(groups[:1]))
    sides = _plain_sides(plain, groups)
    most |= peaks(sides)
    seconds = Seconds(seconds.of | in_turns(sides, options.rounds, "update, transformers").of)
    return Both(gap, seconds, most, num_tokens(groups), flops)


def _plain_sides(plain: PlainPapo, groups: list[Group]) -> dict[str, Side]:
    return {f"plain {kind}": partial(plain.update, kind, groups) for kind in PERCEPTION}
