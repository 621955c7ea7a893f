"""The report on the console: a short table of figures, one of bad rows, and the remarks."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_papo.config import Config
from megatron_papo.data_report.findings import PERCENTILES, DataSurvey, percentiles
from megatron_papo.data_report.remarks import headline, remarks
from megatron_papo.text.untrusted import as_text


def print_report(config: Config, survey: DataSurvey) -> None:
    """Prints everything but examples and histograms, which the page has."""
    console = Console()
    title = Text(as_text(f"data.{survey.which}: {survey.name}"), "bold")
    figures = Table("", "least", *_heads(), "most", title=title, title_justify="left")
    for column in figures.columns[1:]:
        column.justify = "right"
    for name, values in survey.figures.items():
        figures.add_row(name, *(f"{value:,}" for value in percentiles(values)))
    if survey.good:
        console.print(figures)
    if len(survey.sources) > 1:
        console.print(_sources(survey))
    if survey.bad:
        console.print(_reasons(survey))
    rate = survey.num_read / max(survey.seconds, 1e-9)
    print(f"papo: data: {headline(survey)} ({survey.seconds:.0f} s, {rate:.0f} rows/s)")
    for remark in remarks(config, survey):
        print(f"papo: data: {as_text(remark)}")


def _heads() -> list[str]:
    return ["median" if percent == 50 else f"{percent} %" for percent in PERCENTILES]


def _sources(survey: DataSurvey) -> Table:
    table = Table("source", "good rows", "bad rows")
    for name, good, bad in survey.sources:
        table.add_row(Text(as_text(name)), f"{good:,}", f"{bad:,}")
    return table


def _reasons(survey: DataSurvey) -> Table:
    table = Table("bad rows", "rows", "the first of them")
    table.columns[1].justify = "right"
    for reason, number, first in survey.reasons:
        table.add_row(Text(as_text(reason)), str(number), Text(as_text(first)))
    return table
