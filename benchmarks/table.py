"""Shows rows as a table on the console and writes them to a JSON file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.rows import Row


def print_rows(rows: Sequence[Row], title: str) -> None:
    table = Table(title=title)
    table.add_column("name", overflow="fold")
    for column in ("value", "baseline", "ratio"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("unit")
    for row in rows:
        table.add_row(row.name, f"{row.value:,.4g}", f"{row.baseline:,.4g}", f"{row.ratio:.3g}", row.unit)
    console = Console()
    console.width = max(console.width, 120)
    console.print(table)


def write_rows(rows: Sequence[Row], path: Path) -> None:
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
