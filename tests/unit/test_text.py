"""Text of strangers on terminals and pages: what a terminal would obey is shown, and nothing else changes."""

from __future__ import annotations

import pytest

from megatron_papo.text.untrusted import LINES, as_text, hidden_in


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 漢字 [bold]\\n", "plain é 漢字 [bold]\\n"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("\x1b[2J\x9b31m", r"\x1b[2J\x9b31m"),
        ("done\rfailed\b\x7f", r"done\rfailed\x08\x7f"),
        ("a\nb\tc\x85\u2028", r"a\nb\tc\x85\u2028"),
        ("\u202egnp.exe\u202c \u2066\u2069\u200f", r"\u202egnp.exe\u202c \u2066\u2069\u200f"),
        ("\udcff", r"\udcff"),
        (OSError(2, "gone", "\x1b"), r"[Errno 2] gone: '\x1b'"),
    ],
)
def test_what_a_terminal_would_obey_is_shown(text: object, shown: str):
    assert as_text(text) == shown
    assert as_text(shown) == shown


def test_lines_stay_where_they_are_meant():
    assert as_text("a\n\tb\x1b\r", LINES) == "a\n\tb\\x1b\\r"
    assert (hidden_in("a\nb", LINES), hidden_in("a\nb"), hidden_in("a\x00")) == ("", r"\n", r"\x00")
