"""The GPU section of docs/benchmarks.md: a table a part between two markers, rewritten part by part.

A part that was not run this time keeps the text that it had; one that nobody has run says so. Each table says with
which command, on which device, with which versions and when it was made.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from benchmarks.gpu.one_part import PARTS
from benchmarks.gpu.rows import GpuRow

BEGIN, END = "<!-- gpu-check -->", "<!-- /gpu-check -->"
NOT_RUN = "not run"
_INTRODUCTION = """\
`make gpu-check` measures all of this on a GPU and writes it here, what says most about the rest first;
`make gpu-check BUDGET=600` what ten minutes allow, and `python tools/benchmark.py gpu --part NAME --write` one part.
Each part is a process of its own and says in its file (`benchmarks/gpu/NAME.py`) what it compares. A ratio is
value over baseline. Aims: MFU 50 % in bfloat16, FP8 1.25 times bfloat16's tokens/s. No other table of this page comes
from a GPU but that of the first run above."""


@dataclass(frozen=True)
class Made:
    """How a part's rows came to be."""

    command: str
    machine: str
    day: date


def section(parts: Mapping[str, str]) -> str:
    """Markers included; `parts`: the text of each, by name."""
    blocks = [_block(name, parts.get(name, NOT_RUN)) for name in PARTS]
    return "\n\n".join([BEGIN, "## On a GPU", _INTRODUCTION, *blocks, END])


def part_text(rows: Sequence[GpuRow], made: Made) -> str:
    table = ["| | value | baseline | ratio | unit, or why there is none |", "|---|---|---|---|---|"]
    table += ["| " + " | ".join(_cells(row)) + " |" for row in rows]
    return "\n".join([f"`{made.command}`, {made.day.isoformat()}, {made.machine}.", "", *table])


def merged(document: str, parts: Mapping[str, str]) -> str:
    """The document with these parts' text replaced. Raises ValueError where the two markers are not in it, in order."""
    begin, end = document.find(BEGIN), document.find(END)
    if not 0 <= begin < end:
        raise ValueError(f"the document has no section between {BEGIN} and {END}")
    return document[:begin] + section({**parts_of(document), **parts}) + document[end + len(END) :]


def parts_of(text: str) -> dict[str, str]:
    """What a document says of each part, by name."""
    names = {_heading(name): name for name in PARTS}
    _, *blocks = re.split(r"^### ", text.partition(BEGIN)[2].partition(END)[0], flags=re.MULTILINE)
    texts = {}
    for block in blocks:
        heading, _, rest = block.partition("\n")
        if heading in names:
            texts[names[heading]] = rest.strip()
    return texts


def write(file: Path, results: Mapping[str, Sequence[GpuRow]], made: Mapping[str, Made]) -> None:
    text = merged(file.read_text(), {name: part_text(rows, made[name]) for name, rows in results.items()})
    file.write_text(text)


def _block(name: str, text: str) -> str:
    return f"### {_heading(name)}\n\n{text}"


def _heading(name: str) -> str:
    return f"{PARTS[name]} (`{name}`)"


def _cells(row: GpuRow) -> list[str]:
    cells = [row.name, *(number(each) for each in (row.value, row.baseline, row.ratio)), row.note or row.unit]
    return [cell.replace("|", "\\|") for cell in cells]


def number(value: float | None) -> str:
    """Four digits, thousands apart."""
    return "–" if value is None else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
