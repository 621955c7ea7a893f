"""The same update with its matrix products in FP8, by recipe, against bfloat16 on the same card.

One policy at a time, all from the same weights; the first is bfloat16, with the least recomputation that fits, and the
others take the same. Each recipe's log-probs are compared with bfloat16's first: a gap of exactly zero is no FP8, and
nothing is timed. MFU is of the peak in bfloat16, so that it can exceed what bfloat16 can reach. A recipe that the
machine cannot compute is a row with the reason. Without a GPU the rounding is emulated, which is slower.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron.core.extensions.transformer_engine import HAVE_TE
from torch import Tensor

from megatron_papo.config import Fp8Config
from tools.benchmarks.floor import update_flops
from tools.benchmarks.gpu.clock import in_turns, peak_row, peaks, rate_row
from tools.benchmarks.gpu.folder import model_folder
from tools.benchmarks.gpu.policy import PERCEPTION, mean_gap, open_ours, workload
from tools.benchmarks.gpu.rows import GpuRow, Options, attempt, compared, least_recompute, not_measured, release
from tools.benchmarks.gpu.update import mfu_row, optimizer_settings
from tools.benchmarks.ours import Key
from tools.benchmarks.rollouts import make_groups, num_tokens
from tools.benchmarks.timing import Seconds

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
    recompute, plain = least_recompute(lambda which: _measure(folder, options, which, "off"), options.recompute)
    release()  # two policies do not fit
    for recipe in RECIPES:
        yield from attempt(recipe, partial(_one_recipe, folder, options, recompute, recipe, plain))


def _one_recipe(folder: Path, options: Options, recompute: str, recipe: str, plain: Side) -> Iterator[GpuRow]:
    found = _measure(folder, options, recompute, recipe)
    gap = mean_gap(found.logprobs, plain.logprobs)
    if mean_gap(found.fresh, plain.fresh) == 0:
        yield not_measured(recipe, "its log-probs are those without FP8: it has no effect")
        return
    limit = Fp8Config().gap_limit
    yield compared(f"{recipe}: log-probs, mean gap to without FP8 / fp8.gap_limit", gap, limit, "nats")
    for kind in PERCEPTION:
        name = f"{recipe}, {kind}, recompute {recompute}"
        seconds = Seconds({"FP8": found.seconds[kind], "off": plain.seconds[kind]})
        yield rate_row(seconds, f"{name} / without FP8", "FP8", "off", plain.tokens)
        yield mfu_row(f"{name}: MFU of bfloat16's peak / aim", seconds.median("FP8"), found.flops[kind])
        most = {"FP8": found.peaks[kind], "off": plain.peaks[kind]} if found.peaks else {}
        yield peak_row(most, f"{name}: peak memory / without FP8", "FP8", "off")


def _measure(folder: Path, options: Options, recompute: str, recipe: str) -> Side:
    _forget_scales()
    work, more = workload(options), optimizer_settings() | RECIPES.get(recipe, {})
    with open_ours(folder, work, model__recompute=recompute, fp8__recipe=recipe, **more) as ours:
        groups = make_groups(work, ours.run.processor)
        fresh = ours.logprobs(groups[:1])
        ours.update(PERCEPTION[0], groups)
        logprobs = ours.logprobs(groups[:1])
        sides = {kind: partial(ours.update, kind, groups) for kind in PERCEPTION}
        most = peaks(sides)
        seconds = in_turns(sides, options.rounds, f"update, fp8.recipe={recipe}")
        flops = {kind: update_flops(groups, kind, ours.run.shape) for kind in PERCEPTION}
        return Side(fresh, logprobs, seconds.of, most, num_tokens(groups), flops)


def _forget_scales() -> None:
    """Transformer Engine's, of the policy before: it keeps them for the process."""
    if HAVE_TE:
        from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

        FP8GlobalStateManager.reset()
