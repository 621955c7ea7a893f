"""The same update with its matrix products in FP8, by recipe, against bfloat16 on the same card.

One policy at a time, each in a process of its own, all from the same weights; the first is bfloat16, with the least
recomputation that fits by arithmetic, and the others take the same. Each recipe's log-probs are compared with
bfloat16's first: a gap of exactly zero is no FP8, and nothing is timed. MFU is of the peak in bfloat16, beside which it
can exceed 100 %, and of that in FP8. A recipe that the machine cannot compute is a row with the reason. Without a GPU
the rounding is emulated, which is slower.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.floor import update_flops
from benchmarks.gpu.apart import Rows, apart
from benchmarks.gpu.clock import in_turns, peak_row, peaks, rate_row
from benchmarks.gpu.fitting import device_bytes, least_that_fits, needed_by_mode
from benchmarks.gpu.folder import model_folder
from benchmarks.gpu.policy import PERCEPTION, batch, mean_gap, on_host, open_ours, workload
from benchmarks.gpu.rows import GpuRow, Options, attempt, compared, not_measured
from benchmarks.gpu.update import mfu_rows, optimizer_settings
from benchmarks.ours import Key
from benchmarks.rollouts import num_tokens
from benchmarks.timing import Seconds
from megatron_papo.config import Fp8Config
from megatron_papo.types import Group

RECIPES: dict[str, dict[str, Any]] = {
    "tensorwise": {},
    "delayed": {"fp8__first_layers": 0, "fp8__last_layers": 0},  # Megatron-Core leaves no layer out of this one
    "blockwise": {},
}


@dataclass(frozen=True)
class Side:
    """What one policy made of the batch, by kind."""

    fresh: dict[Key, Tensor]
    """Log-probs of the first group, from the drawn weights."""
    logprobs: dict[Key, Tensor]
    """The same after an update, which scales of `delayed` follow; it moves no weight by more than 1e-6."""
    seconds: dict[str, list[float]]
    peaks: dict[str, int]
    tokens: int
    flops: dict[str, int]


def run(options: Options) -> Iterator[GpuRow]:
    with model_folder(options.shape) as folder:
        yield from attempt("FP8", lambda: _all_recipes(folder, options))


def _all_recipes(folder: Path, options: Options) -> Iterator[GpuRow]:
    needed, groups = needed_by_mode(folder, options, **optimizer_settings()), batch(folder, options)
    recompute, plain = yield from least_that_fits(
        _without, needed, device_bytes(), folder, options, groups, only=options.recompute, try_less=False
    )
    for recipe in RECIPES:
        yield from attempt(recipe, partial(apart, _one_recipe, folder, options, groups, recompute, recipe, plain))


def _without(folder: Path, options: Options, groups: list[Group], recompute: str) -> Rows:
    """What the recipes are compared with; its figures are those of the part `update`."""
    yield from ()
    return _measure(folder, options, groups, recompute, "off")


def _one_recipe(folder: Path, options: Options, groups: list[Group], recompute: str, recipe: str, plain: Side) -> Rows:
    side = _measure(folder, options, groups, recompute, recipe)
    gap = mean_gap(side.logprobs, plain.logprobs)
    if mean_gap(side.fresh, plain.fresh) == 0:
        yield not_measured(recipe, "its log-probs are those without FP8: it has no effect")
        return
    limit = Fp8Config().gap_limit
    yield compared(f"{recipe}: log-probs, mean gap to without FP8 / fp8.gap_limit", gap, limit, "nats")
    for kind in PERCEPTION:
        name = f"{recipe}, {kind}, recompute {recompute}"
        seconds = Seconds({"FP8": side.seconds[kind], "off": plain.seconds[kind]})
        yield rate_row(seconds, f"{name} / without FP8", "FP8", "off", plain.tokens)
        yield from mfu_rows(name, seconds.median("FP8"), side.flops[kind], fp8=True)
        most = {"FP8": side.peaks[kind], "off": plain.peaks[kind]} if side.peaks else {}
        yield peak_row(most, f"{name}: peak memory / without FP8", "FP8", "off")


def _measure(folder: Path, options: Options, groups: list[Group], recompute: str, recipe: str) -> Side:
    more = optimizer_settings() | RECIPES.get(recipe, {})
    with open_ours(folder, workload(options), model__recompute=recompute, fp8__recipe=recipe, **more) as ours:
        fresh = on_host(ours.logprobs(groups[:1]))
        ours.update(PERCEPTION[0], groups)
        logprobs = on_host(ours.logprobs(groups[:1]))
        sides = {kind: partial(ours.update, kind, groups) for kind in PERCEPTION}
        most = peaks(sides)
        seconds = in_turns(sides, options.rounds, f"update, fp8.recipe={recipe}", warm_up=False)
        flops = {kind: update_flops(groups, kind, ours.run.shape) for kind in PERCEPTION}
        return Side(fresh, logprobs, seconds.of, most, num_tokens(groups), flops)
