"""The report as one HTML page that opens offline: figures, histograms, bad rows, and a few prompts in full.

Texts and pictures of a data set are not trusted: everything is escaped, and pictures are written anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megatron_papo.config import Config
from megatron_papo.data_report.examples import Example, Piece
from megatron_papo.data_report.findings import PERCENTILES, DataSurvey, most_common, percentiles
from megatron_papo.data_report.histogram import histogram
from megatron_papo.data_report.remarks import headline, kinds_of_answers, remarks
from megatron_papo.observe.html import escape, page
from megatron_papo.observe.samples import figures_of
from megatron_papo.text.untrusted import shortened

_ANSWERS_SHOWN = 10
_LETTERS_SHOWN = 60
_MOST_LETTERS = 20_000
"""Of one piece of a prompt."""

_STYLE = """
:root { color-scheme: light dark; --line: #d9dce1; --soft: #6b7280; --card: #fff; --page: #f4f5f7; --ink: #1f2430;
  --bar: #4c78c8; --bad: #d0453e; --mark: #e8eefb; }
@media (prefers-color-scheme: dark) { :root { --line: #353a45; --soft: #9aa3b2; --card: #1d2028; --page: #14161b;
  --ink: #e6e8ec; --bar: #7ea6ee; --bad: #f07b75; --mark: #2a3550; } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1100px; padding: 1.5rem; color: var(--ink);
  background: var(--page); }
h1 { font-size: 1.3rem; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 1rem; margin: 1.8rem 0 .6rem; }
header p, figcaption, .soft { color: var(--soft); } header p { margin: .2rem 0 1rem; }
.tiles, .plots { display: grid; gap: .8rem; } .tiles { grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }
.plots { grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); }
.tile, .plot, article, .remarks, table { background: var(--card); border: 1px solid var(--line); border-radius: 6px; }
.tile { padding: .6rem .9rem; } .tile b { display: block; font-size: 1.35rem; font-weight: 600; }
.tile.bad b { color: var(--bad); } .tile span { font-size: .82rem; color: var(--soft); }
.plot { padding: .8rem 1rem; } .plot h3 { font-size: .9rem; margin: 0 0 .5rem; } .plot p { margin: .3rem 0 0;
  font-size: .8rem; color: var(--soft); } svg { width: 100%; display: block; } rect { fill: var(--bar); }
line { stroke: var(--line); } text { font: 11px system-ui, sans-serif; fill: var(--soft); }
.remarks { margin: 1rem 0 0; padding: .7rem 1rem .7rem 2rem; } .remarks li { overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem .9rem; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere; } th { font-weight: 500; color: var(--soft); font-size: .85rem; }
tr:last-child td { border-bottom: 0; } td.number, th.number { text-align: right; white-space: nowrap; }
.halves { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); align-items: start; }
article { padding: 1rem 1.2rem; margin-bottom: 1rem; } figure { margin: 0 0 .6rem; } figcaption { font-size: .78rem; }
img { display: block; max-width: 420px; width: 100%; border: 1px solid var(--line); border-radius: 3px; }
img.small { image-rendering: pixelated; width: 240px; } .views { display: flex; gap: 1rem; flex-wrap: wrap; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; margin: .4rem 0 .8rem; padding: .8rem;
  border: 1px solid var(--line); border-radius: 4px; } mark { background: var(--mark); color: inherit;
  border-radius: 3px; padding: 0 .15rem; }
"""


def report_page(config: Config, survey: DataSurvey, examples: Sequence[Example]) -> str:
    """The whole HTML page."""
    title = f"data.{survey.which}: {survey.name}"
    told = remarks(config, survey)
    parts = [
        f"<header><h1>{escape(title)}</h1><p>{escape(headline(survey))}, as papo {survey.verb} reads them</p></header>",
        _tiles(config, survey),
        f"<ul class=remarks>{''.join(f'<li>{escape(remark)}' for remark in told)}</ul>" if told else "",
        _bad_rows(survey),
        _sources(survey),
        _plots(survey),
        _answers(survey),
        _section("What the model is given", "".join(map(_example, examples))) if examples else "",
    ]
    return page(title, _STYLE, "\n".join(parts))


def _section(title: str, body: str) -> str:
    return f"<h2>{escape(title)}</h2>\n{body}"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The second column holds numbers."""
    kinds = ["", " class=number"] + [""] * len(heads)
    head = "".join(f"<th{kind}>{escape(text)}" for kind, text in zip(kinds, heads))
    lines = ("".join(f"<td{kind}>{escape(text)}" for kind, text in zip(kinds, row)) for row in rows)
    return f"<table><tr>{head}{''.join(f'<tr>{line}' for line in lines)}</table>"


def _tiles(config: Config, survey: DataSurvey) -> str:
    tiles = [("good rows", f"{len(survey.good):,}", ""), ("bad rows", f"{len(survey.bad):,}", "bad" * bool(survey.bad))]
    if survey.good:
        least, *_, most = percentiles([row.num_tokens for row in survey.good])
        tiles += [
            (f"prompt tokens, {config.data.max_prompt_tokens:,} are allowed", f"{least:,} to {most:,}", ""),
            ("pictures", f"{len(survey.pixels):,}", ""),
            ("rows without a picture", f"{survey.num_without_pictures / len(survey.good):.1%}", ""),
            ("rows that repeat one", f"{survey.num_repeated:,}", ""),
        ]
    shown = (
        f'<div class="tile {kind}"><b>{escape(value)}</b><span>{escape(name)}</span></div>'
        for name, value, kind in tiles
    )
    return f"<div class=tiles>{''.join(shown)}</div>"


def _bad_rows(survey: DataSurvey) -> str:
    if not survey.bad:
        return ""
    rows = [(reason, f"{number:,}", str(first)) for reason, number, first in survey.reasons]
    return _section("Bad rows", _table(("reason", "rows", "the first of them"), rows))


def _sources(survey: DataSurvey) -> str:
    if len(survey.sources) < 2:
        return ""
    rows = ((name, f"{good:,}", f"{bad:,}") for name, good, bad in survey.sources)
    return _section("Sources", _table(("source", "good rows", "bad rows"), rows))


def _plots(survey: DataSurvey) -> str:
    if not survey.good:
        return ""
    return _section(
        "Lengths and pictures", f"<div class=plots>{''.join(_plot(*item) for item in survey.figures.items())}</div>"
    )


def _plot(name: str, values: Sequence[int]) -> str:
    _, *between, _ = percentiles(values)
    told = " · ".join(
        f"{'median' if percent == 50 else f'{percent} %'} {value:,}" for percent, value in zip(PERCENTILES, between)
    )
    return f"<div class=plot><h3>{escape(name)}</h3>{histogram(values)}<p>{told}</p></div>"


def _answers(survey: DataSurvey) -> str:
    kinds = kinds_of_answers(survey)
    if not kinds:
        return ""
    common = most_common((row.answers[0] for row in survey.good if row.answers), _ANSWERS_SHOWN)
    tables = _table(("kind, by its spelling", "rows"), ((kind, f"{num:,}") for kind, num in kinds)) + _table(
        ("most frequent", "rows"), ((shortened(answer, _LETTERS_SHOWN), f"{num:,}") for answer, num in common)
    )
    return _section("Answers", f"<div class=halves>{tables}</div>")


def _example(example: Example) -> str:
    measured = example.measured
    source = f" of {measured.source}" if measured.source else ""
    tokens = f"{measured.num_tokens:,} tokens, {sum(measured.image_tokens):,} of them for pictures"
    response = (
        "" if example.response is None else f"<p class=soft>demonstration</p><pre>{escape(example.response)}</pre>"
    )
    answers = " or ".join(shortened(answer, _LETTERS_SHOWN) for answer in measured.answers[:_ANSWERS_SHOWN])
    shown = figures_of("as the model sees it", example.pictures) + figures_of("masked", example.masked)
    return (
        f"<article><b>Row {measured.row}{escape(source)}</b> <span class=soft>{escape(tokens)}</span>"
        f"<pre>{''.join(map(_piece, example.pieces))}</pre>{response}"
        f"{f'<p>right answer: {escape(answers)}</p>' if answers else ''}<div class=views>{shown}</div></article>"
    )


def _piece(piece: Piece) -> str:
    if not piece.is_special:
        return escape(shortened(piece.text, _MOST_LETTERS))
    return f"<mark>{escape(piece.text)}</mark>" + (
        f"<span class=soft> × {piece.times:,}</span>" if piece.times > 1 else ""
    )
