"""The frame of a page that shows what models and data say: self-contained, with no script and nothing to fetch.

A browser is told so too (Content-Security-Policy): what slipped through an escape would neither run nor call anyone.
"""

from __future__ import annotations

import html

from megatron_papo.text.untrusted import LINES, as_text

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def page(title: str, style: str, body: str) -> str:
    """`style` and `body` are HTML, `title` is text."""
    return (
        "<!doctype html>\n<html lang=en><meta charset=utf-8>"
        f'<meta http-equiv=Content-Security-Policy content="{_POLICY}">'
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style>\n{body}\n</html>\n"
    )


def escape(text: object) -> str:
    """`text` as HTML that shows it, with its lines, and hidden characters made visible."""
    return html.escape(as_text(text, LINES))
