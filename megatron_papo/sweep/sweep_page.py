"""The table of a sweep for a reader: on the console, as Markdown, and every figure with its spread as CSV."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from html import escape
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_papo.costs.stages import PLANNED_STAGES, shown_stage
from megatron_papo.files.small_files import write_atomically
from megatron_papo.sweep.gather import STAGES, Row
from megatron_papo.sweep.points import INTERVALS, Sweep
from megatron_papo.text.untrusted import as_text

HEADERS = (
    "point", "ranks", "TPxPPxDP", "prompts", "state", "tokens/s", "tokens/s/rank", "speed-up", "ideal", "efficiency",
    "GPU-h/Mtoken", "GPU-h", "MFU", "step s", "planned s", *(f"{shown_stage(stage)} s" for stage in PLANNED_STAGES),
    "other s", "memory GiB", "reason",
)  # fmt: skip
_FIGURES = (
    "tokens_per_s", "tokens_per_s_per_rank", "gpu_hours_per_mtoken", "mfu", "step_s",
    *(f"{stage}_s" for stage in STAGES), "memory_gib", "planned_step_s", "planned_tokens_per_s",
    *(f"planned_{stage}_s" for stage in PLANNED_STAGES),
)  # fmt: skip


def cells(row: Row) -> list[str]:
    """The cells of one row: medians, and the spread of tokens a second and of a step's seconds. Control characters are
    shown, not printed."""
    shown = [
        row.name,
        str(row.ranks),
        row.layout,
        "" if row.prompts is None else str(row.prompts),
        row.state.word,
        _with_spread(row, "tokens_per_s"),
        _number(row.median("tokens_per_s_per_rank")),
        _number(row.speed_up, 2),
        _number(row.ideal, 2),
        _number(row.efficiency, 2),
        _number(row.median("gpu_hours_per_mtoken")),
        _number(row.gpu_hours),
        _number(row.median("mfu"), 3),
        _with_spread(row, "step_s"),
        _number(row.median("planned_step_s")),
        *(_number(row.median(f"{stage}_s")) for stage in PLANNED_STAGES),
        _number(_other(row)),
        _number(row.median("memory_gib"), 2),
        row.state.reason,
    ]
    return [as_text(cell) for cell in shown]


def print_table(rows: Sequence[Row], sweep: Sweep) -> None:
    """Columns that no point has are left out; reasons are lines below."""
    filled = [cells(row)[:-1] for row in rows]
    shown = _columns(filled)
    console = Console()
    console.width = max(console.width, 220)
    table = Table(*(HEADERS[column] for column in shown), title=Text(_title(sweep)), title_justify="left")
    for line in filled:
        table.add_row(*(Text(line[column]) for column in shown))
    console.print(table)
    for row in rows:
        if row.state.reason:
            console.print(f"  {row.name}: {as_text(row.state.reason)}", highlight=False, markup=False, soft_wrap=True)


def markdown(rows: Sequence[Row], sweep: Sweep) -> str:
    filled = [cells(row) for row in rows]
    shown = _columns(filled)
    lines = [
        _title(sweep),
        "",
        "| " + " | ".join(HEADERS[column] for column in shown) + " |",
        "|" + "---|" * len(shown),
    ]
    lines += ["| " + " | ".join(_as_markdown(row[column]) for column in shown) + " |" for row in filled]
    return "\n".join(lines) + "\n"


def _as_markdown(cell: str) -> str:
    return escape(cell, quote=False).replace("|", "\\|")


def write_tables(rows: Sequence[Row], sweep: Sweep) -> list[Path]:
    """DIR/table.md and DIR/table.csv."""
    page, sheet = sweep.folder / "table.md", sweep.folder / "table.csv"
    sweep.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(page, markdown(rows, sweep))
    with sheet.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        spreads = (f"{figure}{end}" for figure in _FIGURES for end in ("", "_min", "_max"))
        writer.writerow([*_CSV_HEAD, *spreads])
        writer.writerows(_csv_row(row) for row in rows)
    return [page, sheet]


_CSV_HEAD = (
    "point", "ranks", "layout", "prompts_per_step", "state", "reason", "runs", "steps", "speed_up", "ideal",
    "efficiency", "gpu_hours",
)  # fmt: skip


def _csv_row(row: Row) -> list[object]:
    """The values of one row, not rounded; empty where there is none."""
    head = [
        row.name, row.ranks, row.layout, row.prompts, row.state.word, row.state.reason, row.num_runs, row.num_steps,
        row.speed_up, row.ideal, row.efficiency, row.gpu_hours,
    ]  # fmt: skip
    spreads = [row.figures.get(figure) for figure in _FIGURES]
    return [
        *head,
        *(value for each in spreads for value in ((each.median, each.low, each.high) if each else [None] * 3)),
    ]


def _columns(filled: Sequence[Sequence[str]]) -> list[int]:
    """The columns in which any row has something."""
    return [column for column in range(len(filled[0])) if any(row[column] for row in filled)]


def _title(sweep: Sweep) -> str:
    runs = f"{sweep.repeats} runs of " if sweep.repeats > 1 else ""
    steps = f"{runs}{sweep.steps} steps without the first {sweep.warm_up}"
    return f"{sweep.name}: {sweep.scaling} scaling, medians of {steps} ({INTERVALS[sweep.interval]})"


def _other(row: Row) -> float | None:
    known = [row.median(f"{stage}_s") or 0.0 for stage in STAGES if stage not in PLANNED_STAGES]
    return sum(known) if row.figures else None


def _with_spread(row: Row, figure: str) -> str:
    spread = row.figures.get(figure)
    return "" if spread is None else f"{_number(spread.median)} ({_number(spread.low)} to {_number(spread.high)})"


def _number(value: float | None, digits: int | None = None) -> str:
    """Three digits that count, unless `digits` behind the dot are asked for."""
    if value is None:
        return ""
    if digits is not None:
        return f"{value:.{digits}f}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
