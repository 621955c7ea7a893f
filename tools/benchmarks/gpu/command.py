"""`tools/benchmark.py gpu`: runs the parts, shows their rows, and writes them where asked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tools.benchmarks.gpu import document
from tools.benchmarks.gpu.checks import FAILED_TESTS
from tools.benchmarks.gpu.machine import machine
from tools.benchmarks.gpu.one_part import PARTS, UNFINISHED, run_part
from tools.benchmarks.gpu.rows import GpuRow, Options

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "benchmarks.md"


@dataclass(frozen=True)
class Targets:
    """Where the rows go beside the console."""

    json: Path | None = None
    document: Path | None = None


def run(parts: Sequence[str], options: Options, targets: Targets) -> int:
    """A part's table is shown and written as soon as it is there: what comes after may be cut off.

    Returns 1 when a part did not come to its end or a test of the GPU paths failed, else 0.
    """
    results: dict[str, list[GpuRow]] = {}
    for name in parts:
        rows = results[name] = run_part(name, options)
        show(rows, f"gpu, {name}{' (quick)' if options.quick else ''}: {PARTS[name]}")
        if targets.json is not None:
            flat = [{"part": part} | asdict(row) for part, found in results.items() for row in found]
            targets.json.write_text(json.dumps(flat, indent=1) + "\n")
        if targets.document is not None:
            made = document.Made(command_of(name, options), machine(), date.today())
            document.write(targets.document, {name: rows}, {name: made})
    return int(any(has_failed(row) for rows in results.values() for row in rows))


def has_failed(row: GpuRow) -> bool:
    """A row without a figure is no failure: a machine may lack what it needs."""
    return row.name.startswith(UNFINISHED) or (row.name == FAILED_TESTS and row.value != 0)


def command_of(name: str, options: Options) -> str:
    """What runs this part alone, as it was run."""
    quick = " --quick" if options.quick else ""
    recompute = f" --recompute {options.recompute}" if options.recompute != "none" else ""
    settings = f"--shape {options.shape} --rounds {options.rounds}{quick}{recompute}"
    return f"python tools/benchmark.py gpu --part {name} {settings}"


def show(rows: Sequence[GpuRow], title: str) -> None:
    table = Table(title=title)
    table.add_column("", overflow="fold")
    for column in ("value", "baseline", "ratio"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("unit, or why there is none", overflow="fold")
    for row in rows:
        numbers = (document.number(value) for value in (row.value, row.baseline, row.ratio))
        table.add_row(row.name, *numbers, row.note or row.unit)
    console = Console()
    console.width = max(console.width, 120)
    console.print(table)
