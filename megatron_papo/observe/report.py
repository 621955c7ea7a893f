"""Reports at the end of a run: curves of RUN/metrics.jsonl as one PNG, and a table of before and after.

Curves of values that were logged at some steps only (evaluations) are drawn with a mark at each. Leaves out anything
interactive: that is what TensorBoard and wandb are for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_papo.files.small_files import read_records
from megatron_papo.observe.old_names import with_new_names
from megatron_papo.text.untrusted import as_text

_COLUMNS = 3
_INK, _SOFT, _LINE = "#1f2430", "#6b7280", "#2468b4"


def read_metrics(metrics_jsonl: Path) -> list[dict[str, float]]:
    """The records of a run, one a logged step, by the names of today. What is no record, or no number, is left out."""
    records = [with_new_names(each) for each in read_records(Path(metrics_jsonl)) if isinstance(each.get("step"), int)]
    numbers = [{name: _number(value) for name, value in record.items()} for record in records]
    return [{name: value for name, value in record.items() if value is not None} for record in numbers]


def _number(value: Any) -> float | None:
    """The number that a JSON value is; `nan` and `inf` are strings in JSON."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def series(records: Sequence[Mapping[str, float]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of one metric, without steps that lack it or where it is not finite."""
    points = [(record["step"], record[key]) for record in records if math.isfinite(record.get(key, math.nan))]
    return [step for step, _ in points], [value for _, value in points]


def curves_png(
    metrics_jsonl: Path, out: Path, keys: Sequence[str], titles: Mapping[str, str] | None = None, heading: str = ""
) -> Path:
    """Draws each metric of `keys` in a panel of its own and writes `out`; keys that no record has are left out.

    `titles`: what to call a key in the picture. Raises ValueError when none of the keys was logged.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_metrics(metrics_jsonl)
    curves = [(key, *series(records, key)) for key in keys]
    curves = [curve for curve in curves if curve[1]]
    if not curves:
        raise ValueError(f"{metrics_jsonl}: has none of {', '.join(keys)}")
    columns = 2 if len(curves) == 4 else min(_COLUMNS, len(curves))
    num_rows = math.ceil(len(curves) / columns)
    figure = Figure(figsize=(4.2 * columns, 2.8 * num_rows + (0.4 if heading else 0)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(num_rows, columns, squeeze=False).flat)
    for panel, (key, steps, values) in zip(panels, curves):
        _draw(panel, (titles or {}).get(key, key), steps, values, len(records))
    for panel in panels[len(curves) :]:
        panel.set_visible(False)
    if heading:
        figure.suptitle(heading, color=_INK, fontsize=13, fontweight="bold")
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
    return out


def smooth(values: Sequence[float], span: int) -> list[float]:
    """Mean over a window of `span` values centred on each, narrower at both ends: it does not lag behind."""
    half, result = span // 2, []
    for place in range(len(values)):
        reach = min(half, place, len(values) - 1 - place)
        window = values[place - reach : place + reach + 1]
        result.append(sum(window) / len(window))
    return result


def before_after_table(
    before: Mapping[str, float],
    after: Mapping[str, float],
    title: str = "Held-out set",
    console: Console | None = None,
) -> str:
    """Prints the two columns and their difference with rich, and returns the same as Markdown.

    Rows are the keys of `before`, then those that only `after` has; a missing value is shown as a dash.
    """
    keys = [*before, *(key for key in after if key not in before)]
    cells = [(as_text(key), *_cells(before.get(key), after.get(key))) for key in keys]
    table = Table(title=title, title_style="bold", header_style="bold")
    table.add_column("")
    for heading in ("before", "after", "change"):
        table.add_column(heading, justify="right")
    for row in cells:
        table.add_row(*map(Text, row))
    (console or Console()).print(table)
    lines = [f"| {title} | before | after | change |", "|---|---:|---:|---:|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in cells]) + "\n"


def _cells(before: float | None, after: float | None) -> tuple[str, str, str]:
    shown = ["–" if value is None else f"{value:.3f}" for value in (before, after)]
    change = "–" if before is None or after is None else f"{after - before:+.3f}"
    return shown[0], shown[1], change


def _draw(panel: Any, title: str, steps: list[float], values: list[float], num_records: int) -> None:
    few = len(steps) < max(8, num_records / 2)
    if few:
        panel.plot(steps, values, color=_LINE, linewidth=1.6, marker="o", markersize=4)
    else:  # the values themselves faint, their centred average over them
        panel.plot(steps, values, color=_LINE, linewidth=0.9, alpha=0.3)
        panel.plot(steps, smooth(values, max(3, len(values) // 8)), color=_LINE, linewidth=2.0)
    panel.set_title(title, fontsize=11, color=_INK, loc="left")
    panel.set_xlabel("step", fontsize=9, color=_SOFT)
    panel.tick_params(labelsize=8, colors=_SOFT)
    panel.grid(alpha=0.25, linewidth=0.6)
    panel.margins(x=0.02)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        panel.spines[side].set_color("#c5cad3")
