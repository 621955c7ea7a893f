"""A certificate as one HTML file: what was compared between whom, how far apart it was, and where.

It has one row for each part and pair of parties, then the log-probs of the responses, token by token, of all parties
side by side. Text is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable

from megatron_papo.observe.html import escape, page
from megatron_papo.parity.certificate import Certificate, Tokens
from megatron_papo.parity.comparison import HUGGINGFACE, Finding

_STYLE = """
:root { color-scheme: light dark; --line: #d9dce1; --soft: #6b7280; --page: #fff; --ink: #1f2430; --bad: #d0453e;
  --good: #2e9e5b; }
@media (prefers-color-scheme: dark) { :root { --line: #353a45; --soft: #9aa3b2; --page: #14161b; --ink: #e6e8ec; } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1100px; padding: 1.5rem; color: var(--ink);
  background: var(--page); }
h1 { font-size: 1.2rem; } h2 { font-size: 1rem; margin-top: 2rem; } p { color: var(--soft); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .15rem .9rem .15rem 0; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 500; } td.number { text-align: right; }
tr.departs td { color: var(--bad); font-weight: 600; } .verdict.departs { color: var(--bad); font-weight: 600; }
.verdict.agrees { color: var(--good); font-weight: 600; }
"""


def certificate_page(certificate: Certificate) -> str:
    """The whole HTML page."""
    mood = "agrees" if certificate.departure is None else "departs"
    title = f"Certificate {'before' if certificate.at_start else 'after'} step {certificate.step}"
    return page(
        title,
        _STYLE,
        f"<h1>{title}</h1>"
        f'<p class="verdict {mood}">{escape(certificate.verdict)}</p><p>{escape(_sides(certificate))}</p>\n'
        + _table(("part", "between", "difference", "limit", "", "worst place"), map(_finding, certificate.findings))
        + _missing(certificate)
        + "".join(map(_response, certificate.responses)),
    )


def _sides(certificate: Certificate) -> str:
    sides = certificate.sides
    how = ", ".join(f"{party} in {sides.precisions[party]}" for party in certificate.parties)
    layout = ", ".join(f"{name} {value}" for name, value in sides.layout.items() if name in _LAYOUT)
    weights = f"weights of Hugging Face: {sides.huggingface_weights}; " if HUGGINGFACE in certificate.parties else ""
    return f"{how}; {weights}engine {sides.engine}; {layout}."


_LAYOUT = ("ranks", "tensor", "pipeline", "sequence")


def _table(head: tuple[str, ...], rows: Iterable[str]) -> str:
    names = "".join(f"<th>{escape(name)}" for name in head)
    return f"<table><tr>{names}</tr>\n" + "\n".join(rows) + "</table>\n"


def _finding(finding: Finding) -> str:
    where = f"{finding.prompt_id}, place {finding.place}" if finding.prompt_id and finding.difference else ""
    return (
        f"<tr{'' if finding.passed else ' class=departs'}><td>{escape(finding.part)}"
        f"<td>{escape(f'{finding.party}, {finding.other}')}"
        f"<td class=number>{finding.difference:.3g}{escape(finding.unit)}"
        f"<td class=number>{finding.limit:g}<td>{'pass' if finding.passed else 'fail'}<td>{escape(where)}</tr>"
    )


def _missing(certificate: Certificate) -> str:
    return "".join(
        f"<p>{escape(f'{kind}: not looked at on the side of {party}: {why}')}</p>"
        for kind, parties in certificate.not_looked_at.items()
        for party, why in parties.items()
    )


def _response(tokens: Tokens) -> str:
    parties = list(tokens.logprobs)
    rows = (
        f"<tr><td>{escape(word)}"
        + "".join(f"<td class=number>{tokens.logprobs[party][place]:.5f}" for party in parties)
        for place, word in enumerate(tokens.tokens)
    )
    return f"<h2>Log-probs of the response to {escape(tokens.prompt_id)}</h2>" + _table(("token", *parties), rows)
