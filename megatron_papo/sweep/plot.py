"""A sweep as a picture: tokens a second against ranks, with the ideal and the planner's, and the stages' shares."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_papo.costs.stages import PLANNED_STAGES, shown_stage
from megatron_papo.sweep.gather import STAGES, Row
from megatron_papo.sweep.points import Sweep

_INK, _SOFT, _LINE, _PLAN = "#1f2430", "#6b7280", "#2468b4", "#d07a1c"
_SHARES = ("#2468b4", "#58a0a6", "#d07a1c", "#8a5fb0", "#b9bec7")


def sweep_png(rows: Sequence[Row], sweep: Sweep, out: Path) -> Path | None:
    """Writes `out`; None, and no file, where no point was measured."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = draw(rows, sweep)
    if figure is None:
        return None
    FigureCanvasAgg(figure)
    figure.savefig(out)
    return out


def draw(rows: Sequence[Row], sweep: Sweep) -> Any:
    """The figure, a panel for speed and one for shares; None where no point was measured."""
    from matplotlib.figure import Figure

    measured = [row for row in rows if row.median("tokens_per_s")]
    if not measured:
        return None
    figure = Figure(figsize=(9.2, 3.8), dpi=110, layout="constrained")
    speed, shares = figure.subplots(1, 2, width_ratios=(1.15, 1.0))
    _draw_speed(speed, measured)
    _draw_shares(shares, measured)
    figure.suptitle(f"{sweep.name}: {sweep.scaling} scaling", color=_INK, fontsize=12, fontweight="bold")
    for panel in (speed, shares):
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(colors=_SOFT, labelsize=8)
    return figure


def _draw_speed(panel: Any, rows: Sequence[Row]) -> None:
    """Both axes from zero, so that the ideal is a straight line through it and what lacks is seen as it is."""
    ranks = [row.ranks for row in rows]
    speeds = [row.figures["tokens_per_s"] for row in rows]
    medians = [speed.median for speed in speeds]
    errors = [[speed.median - speed.low for speed in speeds], [speed.high - speed.median for speed in speeds]]
    per_rank = medians[0] / ranks[0]
    panel.plot([0, max(ranks)], [0, per_rank * max(ranks)], color=_SOFT, linestyle="--", linewidth=1, label="ideal")
    # several layouts of as many ranks are points, not a line
    line = len(set(ranks)) == len(ranks) and ranks == sorted(ranks)
    top = 1.15 * max(per_rank * max(ranks), *(speed.high for speed in speeds))
    _draw_planned(panel, rows, top, ":" if line else "none")
    panel.errorbar(
        ranks, medians, yerr=errors, color=_LINE, linestyle="-" if line else "none", marker="o", capsize=3,
        label="measured",
    )  # fmt: skip
    for row, median in zip(rows, medians):
        if not line:
            panel.annotate(row.name, (row.ranks, median), (6, -3), textcoords="offset points", color=_INK, fontsize=7)
    panel.set_xticks(sorted(set(ranks)))
    panel.set_xlim(0, max(ranks) * 1.2)
    panel.set_ylim(0, top)
    panel.set_xlabel("ranks", color=_INK, fontsize=9)
    panel.set_title("tokens/s, least to most", color=_INK, fontsize=9)
    panel.legend(frameon=False, fontsize=8)


def _draw_planned(panel: Any, rows: Sequence[Row], top: float, line: str) -> None:
    """A plan without calibration may lie far above: it does not press what was measured to the ground."""
    speeds = [(row.ranks, row.median("planned_tokens_per_s")) for row in rows]
    planned = [(ranks, speed) for ranks, speed in speeds if speed is not None]
    if not planned:
        return
    above = max(speed for _, speed in planned) > top
    label = f"planner (up to {max(speed for _, speed in planned):,.0f})" if above else "planner"
    panel.plot(*zip(*planned), color=_PLAN, linestyle=line, marker="x", label=label)


def _draw_shares(panel: Any, rows: Sequence[Row]) -> None:
    """Shares of the stages' medians in a step; stages that the planner does not know are `other`."""
    places = range(len(rows))
    bottom = [0.0] * len(rows)
    for name, color in zip((*PLANNED_STAGES, "other"), _SHARES):
        shares = [_share(row, name) for row in rows]
        panel.bar(places, shares, bottom=bottom, color=color, width=0.6, label=shown_stage(name))
        bottom = [below + share for below, share in zip(bottom, shares)]
    panel.set_xticks(list(places), [row.name for row in rows], rotation=20 if len(rows) > 4 else 0)
    panel.set_ylim(0, 1)
    panel.set_title("share of a step", color=_INK, fontsize=9)
    panel.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _share(row: Row, name: str) -> float:
    seconds = {stage: row.median(f"{stage}_s") or 0.0 for stage in STAGES}
    chosen = [name] if name in seconds else [stage for stage in STAGES if stage not in PLANNED_STAGES]
    return sum(seconds[stage] for stage in chosen) / sum(seconds.values())
