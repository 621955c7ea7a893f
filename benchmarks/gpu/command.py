"""`tools/benchmark.py gpu`: runs the parts, shows their rows as they come, and writes them where asked."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.table import Table

from benchmarks.gpu import document
from benchmarks.gpu.apart import result_apart
from benchmarks.gpu.checks import FAILED_TESTS
from benchmarks.gpu.machine import machine
from benchmarks.gpu.one_part import LIMIT_S, PARTS, UNFINISHED, USUAL_S, run_part
from benchmarks.gpu.rows import GpuRow, Options, not_measured
from benchmarks.gpu.smoke import FAILED_PIECES

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"
NO_TIME = "no time left"
_MUST_BE_NONE = (FAILED_TESTS, FAILED_PIECES)
_WORTH_BEGINNING = 1 / 3
"""Share of the seconds that a part usually takes: with less time left the part is not begun."""


@dataclass(frozen=True)
class Wanted:
    """A part that is to run, written NAME, or with what differs NAME=SECONDS and NAME:quick."""

    name: str
    usual_s: float
    """With less than a third of it left the part is not begun; where time is short, it is cut off after that."""
    quick: bool = False

    @classmethod
    def parse(cls, text: str) -> Wanted:
        """Raises ValueError, which says what there is."""
        rest, _, how = text.partition(":")
        name, _, seconds = rest.partition("=")
        if name not in PARTS:
            raise ValueError(f"{text}: there are {', '.join(PARTS)}")
        if how not in ("", "quick"):
            raise ValueError(f"{text}: behind the colon there can be quick")
        return cls(name, float(seconds) if seconds else USUAL_S[name], how == "quick")


@dataclass(frozen=True)
class Targets:
    """Where the rows go beside the console. Each file keeps what it has of other parts."""

    json: Path | None = None
    document: Path | None = None
    tables: Path | None = None
    """A file to which the tables are appended as they are shown."""


def run(parts: Sequence[Wanted], options: Options, targets: Targets, budget_s: float | None = None) -> int:
    """A row is shown and written to JSON as soon as it is there, a part's table into the document: what comes after may
    be cut off. `budget_s`: of all parts together.

    Returns 1 when a part did not come to its end or a test of the GPU paths failed, else 0.
    """
    failed = False
    for wanted, limit_s in _limited(parts, budget_s):
        own = replace(options, quick=True, rounds=1) if wanted.quick else options
        rows = _one_part(wanted, own, limit_s, targets)
        failed |= any(has_failed(row) for row in rows)
    return int(failed)


def _one_part(wanted: Wanted, options: Options, limit_s: float, targets: Targets) -> list[GpuRow]:
    name, rows, began = wanted.name, list[GpuRow](), time.monotonic()
    others = _others(targets.json, name)

    def take(row: GpuRow) -> None:
        rows.append(row)
        print(f"{name}: {line_of(row)}", flush=True)
        if targets.json is not None:
            _write(targets.json, [*others, *({"part": name} | asdict(each) for each in rows)])

    if limit_s < wanted.usual_s * _WORTH_BEGINNING:
        take(not_measured(name, NO_TIME))
    else:
        run_part(name, options, limit_s, take)
        if targets.document is not None:  # what asks CUDA keeps some of its memory
            made = document.Made(command_of(name, options), result_apart(machine), date.today())
            document.write(targets.document, {name: rows}, {name: made})
    title = f"gpu, {name}{' (quick)' if options.quick else ''}: {PARTS[name]}, {time.monotonic() - began:.0f} s"
    show(rows, title)
    if targets.tables is not None:
        with targets.tables.open("a") as file:
            show(rows, title, file)
    return rows


def _limited(parts: Sequence[Wanted], budget_s: float | None) -> Iterator[tuple[Wanted, float]]:
    """Each part with the seconds that it may take. A budget beyond what all usually take gives all in proportion."""
    if budget_s is None:
        yield from ((wanted, LIMIT_S) for wanted in parts)
        return
    end = time.monotonic() + budget_s
    share = max(1.0, budget_s / sum(wanted.usual_s for wanted in parts))
    for wanted in parts:
        yield wanted, min(wanted.usual_s * share, LIMIT_S, end - time.monotonic())


def _others(file: Path | None, name: str) -> list[dict]:
    """Rows of an earlier call, of other parts."""
    rows = json.loads(file.read_text()) if file is not None and file.exists() else []
    return [row for row in rows if row["part"] != name]


def _write(file: Path, rows: list[dict]) -> None:
    new = file.with_name(f"{file.name}.new")
    new.write_text(json.dumps(rows, indent=1) + "\n")
    new.replace(file)  # a call that is cut off leaves a whole file


def has_failed(row: GpuRow) -> bool:
    """A row without a figure is no failure: a machine may lack what it needs."""
    return row.name.startswith(UNFINISHED) or (row.name in _MUST_BE_NONE and row.value != 0)


def command_of(name: str, options: Options) -> str:
    """What runs this part alone, as it was run."""
    quick = " --quick" if options.quick else ""
    recompute = f" --recompute {options.recompute}" if options.recompute else ""
    settings = f"--shape {options.shape} --rounds {options.rounds}{quick}{recompute}"
    return f"python tools/benchmark.py gpu --part {name} {settings}"


def line_of(row: GpuRow) -> str:
    if row.value is None:
        return f"{row.name}: {row.note}"
    beside = "" if row.baseline is None else f", beside {document.number(row.baseline)}"
    ratio = "" if row.ratio is None else f", ratio {document.number(row.ratio)}"
    return f"{row.name}: {document.number(row.value)} {row.unit}{beside}{ratio}"


def show(rows: Sequence[GpuRow], title: str, file: TextIO | None = None) -> None:
    table = Table(title=title)
    table.add_column("", overflow="fold")
    for column in ("value", "baseline", "ratio"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("unit, or why there is none", overflow="fold")
    for row in rows:
        numbers = (document.number(value) for value in (row.value, row.baseline, row.ratio))
        table.add_row(row.name, *numbers, row.note or row.unit)
    console = Console(file=file)
    console.width = max(console.width, 120)
    console.print(table)
