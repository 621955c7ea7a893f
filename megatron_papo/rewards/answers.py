"""Finding the answer in a response, and the cheap rules that settle most comparisons: string, number, choice.

Every function here is linear in a capped length, so that no answer can cost time. `agree` says True or False where a
rule applies and None where it takes algebra; that rest is for `verifier`. What the rules decide beyond equality:

- numbers: 1,000 = 1000, 1e3 = 1000, 1/2 = 0.5 = 50\\%, and 50\\% = 50; within a millionth of the smaller of 1 and the
  gold value, so that 0.333333 = 1/3 and 2e-7 is not 1e-7;
- choices: where the gold answer is a letter, A = (A) = A. 30 = \\text{A};
- words of three letters and more are words, compared without case, not products of variables.
"""

from __future__ import annotations

import re
from fractions import Fraction

MAX_ANSWER = 200
"""Characters of a box; a longer one is no answer."""
MAX_DEPTH = 12
"""Nested braces of a box."""
_MAX_EXPONENT = 300
_MAX_DIGITS = 100

_NUMBER = re.compile(
    r"([+-]?)\$?(\d{1,3}(?:(?:,|\{,\})\d{3})+|\d+)?(?:\.(\d*))?(?:[eE]([+-]?\d{1,4})|\\times10\^\{?([+-]?\d{1,4})\}?)?"
)
_FRACTION = re.compile(r"([+-]?)(?:\\frac\{([+-]?[\d.,]+)\}\{([+-]?[\d.,]+)\}|([\d.,]+)/([\d.,]+))")
_THOUSANDS = re.compile(r"(?<=\d) (?=\d{3}(?!\d))")
_TWO_NUMBERS = re.compile(r"\d \d")
_CHOICE = re.compile(r"\(?([A-Ja-j])(?:[).:].*)?", re.DOTALL)
_GOLD_CHOICE = re.compile(r"\(?([A-J])(?:[).:].*)?", re.DOTALL)
_WORDS = re.compile(r"[^\W\d_]{3,}(?:[ '’-]+[^\W\d_]+)*")
_SIGNS = str.maketrans(
    {"−": "-", "°": "^\\circ", "×": "\\times ", "·": "\\cdot ", "π": "\\pi ", "≤": "\\le ", "≥": "\\ge "}
)
_WRAPPED = re.compile(r"\\(?:text|mathrm|mathbf|textbf|operatorname|mbox)\{([^{}]*)\}")


def last_box(text: str) -> str | None:
    """What the last `\\boxed{…}` holds, its braces balanced; None without one, or where it is too long or too deep."""
    start = text.rfind("\\boxed")
    if start < 0:
        return None
    head = text[start + len("\\boxed") : start + len("\\boxed") + MAX_ANSWER + 10]
    stripped = head.lstrip(" ")
    if not stripped.startswith("{"):
        return None
    depth, skip = 0, False
    for place, letter in enumerate(stripped[: MAX_ANSWER + 2]):
        if skip:
            skip = False
        elif letter == "\\":
            skip = True  # \{ and \} are signs of a set, not braces
        elif letter == "{":
            depth += 1
            if depth > MAX_DEPTH:
                return None
        elif letter == "}":
            depth -= 1
            if depth == 0:
                return stripped[1:place].strip()
    return None


def gold_answer(answer: str) -> str:
    """The dataset's answer without the box that some datasets put around it."""
    boxed = last_box(answer)
    return answer.strip() if boxed is None else boxed


def plain_latex(answer: str) -> str:
    """What math-verify reads best: Unicode signs as LaTeX writes them, text wrappers gone."""
    return _WRAPPED.sub(r"\1", answer.translate(_SIGNS))


def normalise(answer: str) -> str:
    """One spelling of the same string: no math delimiters, spacing commands, text wrappers or closing full stop."""
    answer = answer.strip().strip("$").strip()
    for command in ("\\left", "\\right", "\\!", "\\,", "\\;", "\\:", "\\ "):
        answer = answer.replace(command, "")
    answer = answer.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    return " ".join(plain_latex(answer).removesuffix(".").split())


def agree(answer: str, gold: str) -> bool | None:
    """Whether the rules call `answer` right; None where none applies. Nothing agrees with an empty answer."""
    if not answer.strip() or not gold.strip() or not " ".join(answer.split()).isprintable():
        return False  # control characters and halves of surrogates are no answer
    answer, gold = normalise(answer), normalise(gold)
    if answer == gold:
        return bool(answer)
    gold_choice = _GOLD_CHOICE.fullmatch(gold)
    if gold_choice and (choice := _CHOICE.fullmatch(answer)):
        return choice.group(1).upper() == gold_choice.group(1)
    if _WORDS.fullmatch(answer) and _WORDS.fullmatch(gold):
        return answer.casefold() == gold.casefold()
    value, gold_value = number(answer), number(gold)
    if value is None or gold_value is None:
        return None
    if answer.endswith("%") and not gold.endswith("%"):
        return _near(value, gold_value) or _near(value / 100, gold_value)
    if gold.endswith("%") and not answer.endswith("%"):
        return _near(value, gold_value) or _near(100 * value, gold_value)
    return _near(value, gold_value)


def number(text: str) -> Fraction | None:
    """The exact value of a plain number, fraction or percentage (as its number of percent); None for anything else."""
    text = _THOUSANDS.sub("", text)
    if _TWO_NUMBERS.search(text):
        return None
    text = text.replace(" ", "").removesuffix("%").removesuffix("\\")
    fraction = _FRACTION.fullmatch(text)
    if not fraction:
        return _decimal(text)
    sign, *parts = fraction.groups()
    top, bottom = (_decimal(part) for part in parts if part is not None)
    if top is None or not bottom:
        return None
    return -top / bottom if sign == "-" else top / bottom


def _decimal(text: str) -> Fraction | None:
    matched = _NUMBER.fullmatch(text)
    if not matched or len(text) > _MAX_DIGITS:
        return None
    sign, whole, decimals, exponent, times_exponent = matched.groups()
    if not whole and not decimals:
        return None
    power = int(exponent or times_exponent or 0)
    if abs(power) > _MAX_EXPONENT:
        return None
    digits = (whole or "0").replace(",", "").replace("{", "").replace("}", "")
    value = Fraction(f"{digits}.{decimals or '0'}") * Fraction(10) ** power
    return -value if sign == "-" else value


def _near(value: Fraction, gold: Fraction) -> bool:
    return abs(value - gold) <= Fraction(1, 10**6) * min(Fraction(1), abs(gold))
