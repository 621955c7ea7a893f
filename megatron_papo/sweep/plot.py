"""Sweeps as pictures, as PNG, PDF and SVG: tokens a second against ranks, with the ideal and the planner's, and the
stages' shares; several sweeps beside each other with their efficiency."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from megatron_papo.costs.stages import PLANNED_STAGES, shown_stage
from megatron_papo.sweep.gather import STAGES, Row
from megatron_papo.sweep.points import INTERVALS, Sweep

_INK, _SOFT, _LINE, _PLAN = "#1f2430", "#6b7280", "#2468b4", "#d07a1c"
_SHARES = ("#2468b4", "#58a0a6", "#d07a1c", "#8a5fb0", "#b9bec7")


FORMATS = ("png", "pdf", "svg")


def write_figure(figure: Any, out: Path) -> list[Path]:
    """Writes `figure` as `out` with each of FORMATS as its ending. Text stays text in PDF and SVG, and the same figure
    gives the same bytes."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    files = [out.with_suffix(f".{ending}") for ending in FORMATS]
    undated = {"png": {}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}
    with matplotlib.rc_context({"pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "papo"}):
        for file in files:
            figure.savefig(file, metadata=undated[file.suffix[1:]])
    return files


def sweep_figure(rows: Sequence[Row], sweep: Sweep, out: Path) -> list[Path]:
    """Writes the figure of one sweep, see `write_figure`; no file where no point was measured."""
    figure = draw(rows, sweep)
    return [] if figure is None else write_figure(figure, out)


def compared_figure(sweeps: Sequence[tuple[Sweep, Sequence[Row]]], out: Path) -> list[Path]:
    """Writes several sweeps as one figure; no file where nothing was measured. The axes are those of the first."""
    figure = draw_compared(sweeps)
    return [] if figure is None else write_figure(figure, out)


def draw(rows: Sequence[Row], sweep: Sweep) -> Any:
    """The figure, a panel for speed and one for shares; None where no point was measured."""
    from matplotlib.figure import Figure

    measured = [row for row in rows if row.median("tokens_per_s")]
    if not measured:
        return None
    figure = Figure(figsize=(9.2, 3.8), dpi=110, layout="constrained")
    speed, shares = figure.subplots(1, 2, width_ratios=(1.15, 1.0))
    _draw_speed(speed, measured, sweep)
    _draw_shares(shares, measured)
    figure.suptitle(f"{sweep.name}: {sweep.scaling} scaling", color=_INK, fontsize=12, fontweight="bold")
    _tidy(speed, shares)
    return figure


def _tidy(*panels: Any) -> None:
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(colors=_SOFT, labelsize=8)


def draw_compared(sweeps: Sequence[tuple[Sweep, Sequence[Row]]]) -> Any:
    """Tokens a second and efficiency against ranks, a line a sweep; None where nothing was measured."""
    from matplotlib.figure import Figure

    measured = [(sweep, [row for row in rows if row.median("tokens_per_s")]) for sweep, rows in sweeps]
    measured = [(sweep, rows) for sweep, rows in measured if rows]
    if not measured:
        return None
    figure = Figure(figsize=(9.2, 3.8), dpi=110, layout="constrained")
    speed, efficiency = figure.subplots(1, 2)
    for (sweep, rows), color in zip(measured, cycle(_SHARES)):
        ranks = [row.ranks for row in rows]
        base = rows[0].figures["tokens_per_s"].median / ranks[0]
        speed.plot(_span(ranks), [base * each for each in _span(ranks)], color=color, linestyle="--", linewidth=0.8)
        _draw_measured(speed, rows, color, sweep.name)
        line = "-" if ranks == sorted(set(ranks)) else "none"
        efficiency.plot(ranks, [row.efficiency for row in rows], color=color, marker="o", linestyle=line)
    axes = measured[0][0].axes
    every = sorted({row.ranks for _, rows in measured for row in rows})
    for panel, title in ((speed, "tokens/s (dashed: ideal)"), (efficiency, "efficiency")):
        _set_ranks(panel, every, axes)
        panel.set_title(title, color=_INK, fontsize=9)
    if axes == "log":
        _set_log_speed(speed)
    else:
        speed.set_ylim(0)
    efficiency.set_ylim(0, 1.1 * max(1.0, *(row.efficiency or 0.0 for _, rows in measured for row in rows)))
    efficiency.axhline(1.0, color=_SOFT, linestyle="--", linewidth=0.8)
    speed.legend(frameon=False, fontsize=8)
    _tidy(speed, efficiency)
    return figure


def _span(ranks: Sequence[int]) -> tuple[int, int]:
    return min(ranks), max(ranks)


def _set_log_speed(panel: Any) -> None:
    panel.set_yscale("log", base=2)
    panel.yaxis.set_major_formatter("{x:,.0f}")


def _set_ranks(panel: Any, ranks: Sequence[int], axes: str) -> None:
    """The axis of ranks, with those that were measured as its ticks."""
    if axes == "log":
        panel.set_xscale("log", base=2)
        panel.set_xlim(min(ranks) / 1.25, max(ranks) * 1.25)
    else:
        panel.set_xlim(0, max(ranks) * 1.2)
    panel.set_xticks(ranks, [str(each) for each in ranks])
    panel.minorticks_off()
    panel.set_xlabel("ranks", color=_INK, fontsize=9)


def _draw_measured(panel: Any, rows: Sequence[Row], color: str, label: str) -> None:
    """Medians of tokens a second with their intervals; several layouts of as many ranks are points, not a line."""
    ranks, speeds = [row.ranks for row in rows], [row.figures["tokens_per_s"] for row in rows]
    medians = [speed.median for speed in speeds]
    errors = [[speed.median - speed.low for speed in speeds], [speed.high - speed.median for speed in speeds]]
    line = "-" if ranks == sorted(set(ranks)) else "none"
    panel.errorbar(ranks, medians, yerr=errors, color=color, linestyle=line, marker="o", capsize=3, label=label)


def _draw_speed(panel: Any, rows: Sequence[Row], sweep: Sweep) -> None:
    """Linear axes begin at zero, so that what lacks to the ideal is seen as it is; in both kinds that is a straight
    line."""
    ranks = [row.ranks for row in rows]
    speeds = [row.figures["tokens_per_s"] for row in rows]
    per_rank = speeds[0].median / ranks[0]
    start = min(ranks) if sweep.axes == "log" else 0
    ideal = [per_rank * start, per_rank * max(ranks)]
    panel.plot([start, max(ranks)], ideal, color=_SOFT, linestyle="--", linewidth=1, label="ideal")
    is_line = ranks == sorted(set(ranks))
    top = 1.15 * max(ideal[1], *(speed.high for speed in speeds))
    _draw_planned(panel, rows, top, ":" if is_line else "none")
    _draw_measured(panel, rows, _LINE, "measured")
    for row, speed in zip(rows, speeds):
        if not is_line:
            place = (row.ranks, speed.median)
            panel.annotate(row.name, place, (6, -3), textcoords="offset points", color=_INK, fontsize=7)
    _set_ranks(panel, sorted(set(ranks)), sweep.axes)
    if sweep.axes == "log":
        _set_log_speed(panel)
        panel.set_ylim(min(speed.low for speed in speeds) / 1.25, top)
    else:
        panel.set_ylim(0, top)
    panel.set_title(f"tokens/s, {INTERVALS[sweep.interval]}", color=_INK, fontsize=9)
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
