"""One spelling of an answer: Unicode as LaTeX writes it, full-width signs, wrappers, sizes and spaces of LaTeX.

`spell` reads a text once, token by token, so that `\\left` is not found in `\\leftarrow`. What stood in upright text
(`\\text{…}`, `\\mathrm{…}`) is marked, because a letter there is a unit or a word and not a variable; `plain` takes the
marks away. Nothing here knows what an answer means.
"""

from __future__ import annotations

import re
import unicodedata

OPEN, CLOSE = "\x02", "\x03"
"""Around what stood in upright text. No answer has control characters: `answers.agree` refuses them before."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_UPRIGHT = _words(
    "text textrm textnormal textup textbf textit textsf texttt mathrm mathsf mbox hbox operatorname emph unit si"
)
_BOLD = _words("mathbf boldsymbol bm pmb mathit mathnormal ensuremath")
_SWITCHES = _words("rm bf it sf tt bfseries itshape")
"""Fonts for the rest of a group: `{\\rm cm}`."""
_DROPPED = _words(
    "! left right middle big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr displaystyle textstyle "
    "scriptstyle limits nolimits tiny small normalsize large Large LARGE huge Huge ( ) [ ]"
)
_SPACES = _words(", ; : > quad qquad enspace thinspace medspace thickspace nobreakspace") | {" ", "\n", "\t"}
_RENAMED = {
    "dfrac": "\\frac", "tfrac": "\\frac", "cfrac": "\\frac", "leq": "\\le", "leqslant": "\\le", "geq": "\\ge",
    "geqslant": "\\ge", "neq": "\\ne", "to": "\\rightarrow", "longrightarrow": "\\rightarrow", "gets": "\\leftarrow",
    "longleftarrow": "\\leftarrow", "implies": "\\Rightarrow", "iff": "\\Leftrightarrow", "varnothing": "\\emptyset",
    "degree": "^\\circ", "textdegree": "^\\circ", "celsius": "^\\circ C", "lbrace": "\\{", "rbrace": "\\}",
    "lbrack": "[", "rbrack": "]", "langle": "(", "rangle": ")", "vert": "|", "lvert": "|", "rvert": "|", "mid": "|",
    "ast": "*", "colon": ":", "slash": "/", "%": "%", "_": "_", "&": "&", "#": "#", "prime": "'",
    "ohm": "\\Omega", "simeq": "\\approx",
}  # fmt: skip
_TOKEN = re.compile(r"\\(?:left|right) ?\.|\\[A-Za-z]+|\\.|[{}]|[^\\{}]+|\\", re.DOTALL)
_TWICE_ESCAPED = re.compile(r"\\\\(?=[A-Za-z])")
_TILDE = re.compile(r"(?<!\d)~|~(?!\d)")  # 3~5 is a range
_SHORT_FRACTION = re.compile(r"\\frac ?(?:(\d) ?(\d)|(\d) ?\{(\d+)\}|\{(\d+)\} ?(\d))")
_ABOUT = re.compile(
    r"(?:\\approx|\\sim|=|approximately|approx\.?|about|around|roughly|大约|约为|约)(?![A-Za-z]) *(?=[\d\\.$+(-])", re.I
)
_PERCENT = re.compile(r" *[\x02\x03]* *(?:percent|per cent|pct)[\x02\x03. ]*$", re.IGNORECASE)
_LONE = re.compile(r"([\^_]) ?\{ ?([0-9A-Za-z+-]) ?\}")  # x^{2}
_PI = re.compile(r"(?<![A-Za-z\\])pi(?![A-Za-z])")
_LOOSE_SPACE = re.compile(r"(?<![^\W_]) +| +(?![^\W_])")

_SIGNS = {
    **dict.fromkeys("−–—‒―‐‑﹣", "-"), **dict.fromkeys("°º˚∘", "^\\circ "), "℃": "^\\circ C", "℉": "^\\circ F",
    **dict.fromkeys("×✕✖", "\\times "), **dict.fromkeys("·⋅∙•・", "\\cdot "), "÷": "\\div ", "±": "\\pm ",
    **dict.fromkeys("≤⩽≦", "\\le "), **dict.fromkeys("≥⩾≧", "\\ge "), "≠": "\\ne ", "∞": "\\infty ",
    **dict.fromkeys("≈≒≃", "\\approx "), "∼": "\\sim ", "≅": "\\cong ",
    "∈": "\\in ", "∉": "\\notin ", "∪": "\\cup ", "∩": "\\cap ",
    "∅": "\\emptyset ", "⊂": "\\subset ", "⊆": "\\subseteq ", "∠": "\\angle ", "△": "\\triangle ", "Δ": "\\Delta ",
    "⊥": "\\perp ", **dict.fromkeys("∥‖", "\\parallel "), "→": "\\rightarrow ", "←": "\\leftarrow ",
    "↔": "\\leftrightarrow ", "⇒": "\\Rightarrow ", "⇐": "\\Leftarrow ", "⇔": "\\Leftrightarrow ", "ℝ": "\\mathbb{R}",
    "ℤ": "\\mathbb{Z}", "ℕ": "\\mathbb{N}", "ℚ": "\\mathbb{Q}", "∕": "/", "⁄": "/", "∶": ":", "、": ",", "。": ".",
    "～": "~", "〜": "~", "【": "[", "】": "]", **dict.fromkeys("’‘′", "'"), **dict.fromkeys("“”″", '"'),
    **dict.fromkeys("ΩΩ", "\\Omega "), **dict.fromkeys("µμ", "\\mu "), "ℓ": "L", "㎡": "m^2", "㎥": "m^3",
    "㎠": "cm^2", "㎤": "cm^3", "㎢": "km^2", "㎟": "mm^2",
}  # fmt: skip
_GREEK = (
    "αalpha βbeta γgamma δdelta εepsilon ζzeta ηeta θtheta κkappa λlambda"
    " νnu ξxi πpi ρrho σsigma τtau φphi ϕphi χchi ψpsi ωomega"
)
_SIGNS |= {name[0]: f"\\{name[1:]} " for name in _GREEK.split()}
_SIGNS |= {
    sign: "\\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", sign).split("⁄")) for sign in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞⅐⅑⅒"
}
_TABLE = str.maketrans(_SIGNS)
_RAISED, _LOWERED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ]+"), re.compile("[₀₁₂₃₄₅₆₇₈₉₊₋]+")
_ROOT = re.compile(r"([√∛∜]) *(?:(\d+(?:\.\d+)?|[A-Za-z])|\(([^()]*)\))?")
_ROOTS = {"√": "\\sqrt", "∛": "\\sqrt[3]", "∜": "\\sqrt[4]"}


def spell(answer: str) -> str:
    """The one spelling, with marks around upright text; for ASCII and Unicode alike."""
    answer = answer.strip()
    if answer.isascii() and (len(answer) == 1 or answer.isdigit()):
        return answer  # most answers, and nothing to do
    if not answer.isascii():
        answer = _as_latex(answer)
    if answer.startswith("$") and answer.count("$") == 1:
        answer = "\\" + answer  # five dollars, and not the beginning of a formula
    if "\\begin" not in answer:
        answer = _TWICE_ESCAPED.sub("\\\\", answer)
    answer = " ".join(_read(answer).replace("{,}", ",").split())
    answer = _PERCENT.sub("%", _ABOUT.sub("", answer, count=1) if _ABOUT.match(answer) else answer)
    answer = _PI.sub(r"\\pi ", answer)
    answer = _LONE.sub(r"\1\2", _SHORT_FRACTION.sub(_long_fraction, answer))
    return answer.removesuffix(".").strip()


def plain(spelled: str) -> str:
    """The spelling without marks."""
    if OPEN not in spelled and CLOSE not in spelled:
        return spelled
    spelled = re.sub(r"(\\[A-Za-z]+)[\x02\x03]+(?=[A-Za-z])", r"\1 ", spelled)
    return " ".join(spelled.replace(OPEN, "").replace(CLOSE, "").removesuffix(".").split())


def normalise(answer: str) -> str:
    """The spelling of a whole answer to compare as text: no marks, and no spaces around signs."""
    return tight(plain(spell(answer)))


def tight(text: str) -> str:
    """Without the spaces that part no words: `(1, 2)` and `(1,2)` are the same text."""
    return _LOOSE_SPACE.sub("", text)


def _as_latex(text: str) -> str:
    """Unicode's signs as LaTeX writes them, full-width and styled letters as plain ones."""
    text = _ROOT.sub(_root, text)
    text = _RAISED.sub(lambda match: f"^{{{_flat(match[0])}}}", text)
    text = _LOWERED.sub(lambda match: f"_{{{_flat(match[0])}}}", text)
    return unicodedata.normalize("NFKC", text.translate(_TABLE)).translate(_TABLE)


def _flat(text: str) -> str:
    return unicodedata.normalize("NFKC", text).replace("−", "-")


def _root(match: re.Match[str]) -> str:
    under = match[2] or match[3]
    return _ROOTS[match[1]] + (f"{{{under}}}" if under else " ")


def _long_fraction(match: re.Match[str]) -> str:
    top, bottom = (part for part in match.groups() if part is not None)
    return f"\\frac{{{top}}}{{{bottom}}}"


def _read(text: str) -> str:
    """The tokens of LaTeX in their one spelling. Linear: each token is read once."""
    out: list[str] = []
    groups: list[str] = []  # what closes each open brace
    wrapper: str | None = None  # the kind of the wrapper just read, until its brace opens
    for token in _TOKEN.findall(text):
        name = token[1:] if token[0] == "\\" else ""
        if wrapper is not None and token.isspace():
            continue
        if token == "{":
            opens = wrapper if wrapper is not None and not (out and out[-1][-1:] in ("^", "_")) else "{"
            groups.append({"{": "}", OPEN: CLOSE, "": ""}[opens])
            out.append(opens)
        elif token == "}":
            out.append(groups.pop() if groups else "}")
        elif name in _SWITCHES:
            if out and out[-1] == "{" and groups:
                out[-1], groups[-1] = OPEN, CLOSE
        elif name in _DROPPED or name.rstrip(" .") in ("left", "right"):
            pass
        elif name in _SPACES:
            out.append(" ")
        elif name and name not in _UPRIGHT and name not in _BOLD:
            out.append(_RENAMED.get(name, token))
        elif not name:
            out.append(_TILDE.sub(" ", token.replace("$", "")))
        wrapper = OPEN if name in _UPRIGHT else "" if name in _BOLD else None
    return _joined(out)


def _joined(tokens: list[str]) -> str:
    """A command and the letter after it stay apart, where what stood between them is gone."""
    out: list[str] = []
    for token in tokens:
        if token and out and token[0].isalpha() and re.fullmatch(r"\\[A-Za-z]+", out[-1]):
            out.append(" ")
        if token:
            out.append(token)
    return "".join(out)
