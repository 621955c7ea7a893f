"""How an update's time grows with group size, prompt length and number of pictures, beside its useful work.

Useful work is the arithmetic that the model cannot do without (`megatron_papo.costs.flops`): a prompt once a group,
causal attention, logits of response tokens. The line beside each curve is the time of its smallest point, scaled by
useful FLOPs: a curve below it grows more slowly than the work, because fixed costs are shared; one above it does
something more.
"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks.floor import update_flops
from benchmarks.models import write_model
from benchmarks.ours import Ours, open_ours
from benchmarks.rollouts import Workload, make_groups
from benchmarks.rows import Row
from benchmarks.timing import Seconds, measure

KINDS = ("GRPO", "PAPO joint")
BASE = Workload(600, 64, num_prompts=2)
SERIES: dict[str, dict[int, Workload]] = {
    "rollouts of a prompt": {size: replace(BASE, group_size=size) for size in (1, 2, 4, 8, 16)},
    "tokens of a prompt": {length: replace(BASE, prompt_tokens=length) for length in (150, 300, 600, 900, 1200)},
    "pictures of a prompt, 150 tokens each": {
        num: replace(BASE, prompt_tokens=150 * num, num_images=num) for num in (1, 2, 4, 8)
    },
}
QUICK_BASE = Workload(96, 16, num_prompts=1, group_size=2)
QUICK_SERIES = {
    "rollouts of a prompt": {size: replace(QUICK_BASE, group_size=size) for size in (1, 2)},
    "pictures of a prompt, 96 tokens each": {
        num: replace(QUICK_BASE, prompt_tokens=96 * num, num_images=num) for num in (1, 2)
    },
}


def run(quick: bool, rounds: int | None = None, plot: Path | None = None) -> list[Row]:
    """A row for every point of every curve: seconds, the line of useful work, and how far above it they are."""
    rounds = rounds or (1 if quick else 3)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model")
        with open_ours(folder) as ours:
            series = QUICK_SERIES if quick else SERIES
            rows = {name: _series(ours, name, points, rounds) for name, points in series.items()}
    if plot is not None:
        _draw(series, rows, plot)
    return [row for per_kind in rows.values() for curve in per_kind.values() for row in curve]


def _series(ours: Ours, name: str, points: dict[int, Workload], rounds: int) -> dict[str, list[Row]]:
    groups = {x: make_groups(workload, ours.run.processor) for x, workload in points.items()}
    measured = {}
    for kind in KINDS:
        ours.update(kind, groups[min(groups)])
        sides = {str(x): partial(ours.update, kind, groups[x]) for x in groups}
        seconds = measure(sides, rounds, f"{kind}, {name}")
        flops = {x: update_flops(groups[x], kind, ours.run.shape) for x in groups}
        measured[kind] = [_row(f"growth: {kind}, {x} {name}", seconds, x, flops) for x in groups]
    return measured


def _row(name: str, seconds: Seconds, x: int, flops: dict[int, int]) -> Row:
    smallest = min(flops)
    line = [value * flops[x] / flops[smallest] for value in seconds.of[str(smallest)]]
    ratio = statistics.median(own / straight for own, straight in zip(seconds.of[str(x)], line, strict=True))
    return Row(name, seconds.median(str(x)), statistics.median(line), ratio, "s")


def _draw(series: dict[str, dict[int, Workload]], rows: dict[str, dict[str, list[Row]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(series), figsize=(4.5 * len(series), 3.6), squeeze=False)
    for axis, (name, points) in zip(axes[0], series.items(), strict=True):
        for color, (kind, curve) in zip(("tab:blue", "tab:orange"), rows[name].items()):
            axis.plot(list(points), [row.value for row in curve], "o-", color=color, label=kind)
            axis.plot(list(points), [row.baseline for row in curve], "--", color=color, label=f"{kind}, useful work")
        axis.set(xlabel=name, ylabel="seconds of an update", xlim=(0, None), ylim=(0, None))
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
