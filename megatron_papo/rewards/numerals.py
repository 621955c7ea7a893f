"""Plain numbers, exactly: decimals, powers of ten and words for them, fractions, mixed numbers, percentages."""

from __future__ import annotations

import re
from fractions import Fraction

_MAX_EXPONENT = 300
_MAX_DIGITS = 100
_MILLIONTH = Fraction(1, 10**6)
_TEN = r"(?:\\times|\\cdot|\*|x)10\^(?:([+-]?\d{1,4})|\{([+-]?\d{1,4})\}|\(([+-]?\d{1,4})\))"
_NUMBER = re.compile(rf"([+-]?)(\d{{1,3}}(?:(?:,|\{{,\}})\d{{3}})+|\d+)?(?:\.(\d*))?(?:[eE]([+-]?\d{{1,4}})|{_TEN})?")
_POWER_OF_TEN = re.compile(r"([+-]?)10\^(?:([+-]?\d{1,4})|\{([+-]?\d{1,4})\}|\(([+-]?\d{1,4})\))")
_FRACTION = re.compile(r"([+-]?)(?:\\frac\{([+-]?[\d.,]+)\}\{([+-]?[\d.,]+)\}|([\d.,]+)/([\d.,]+))")
_MIXED = re.compile(r"([+-]?) ?(\d+) ?(?:\\frac ?\{(\d+)\} ?\{(\d+)\}|(?<= )(\d+) ?/ ?(\d+))")
_THOUSANDS = re.compile(r"(?<=\d) (?=\d{3}(?!\d))")
_TWO_NUMBERS = re.compile(r"\d \d")
_SCALES = {
    "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "万": 10**4,
    "亿": 10**8,
}  # fmt: skip
_SCALED = re.compile(rf"(.*\d) ?({'|'.join(_SCALES)})", re.IGNORECASE)


def number(text: str) -> Fraction | None:
    """The exact value of a plain number, fraction or percentage (as its number of percent); None for anything else."""
    if not any(letter.isdigit() for letter in text):
        return None
    if scaled := _SCALED.fullmatch(text):
        value = number(scaled[1])
        return None if value is None else value * _SCALES[scaled[2].lower()]
    text = text.removesuffix("%").rstrip(" \\")
    if len(text) <= _MAX_DIGITS and (mixed := _MIXED.fullmatch(text)):
        return _mixed(mixed)
    text = _THOUSANDS.sub("", text)
    if _TWO_NUMBERS.search(text):
        return None
    text = text.replace(" ", "")
    fraction = _FRACTION.fullmatch(text)
    if not fraction:
        return _decimal(text)
    sign, *parts = fraction.groups()
    top, bottom = (_decimal(part) for part in parts if part is not None)
    if top is None or not bottom:
        return None
    return -top / bottom if sign == "-" else top / bottom


def equal_numbers(answer: str, gold: str) -> bool | None:
    """Whether two plain numbers are the same, a percentage read either way; None where one of them is no number."""
    value, gold_value = number(answer), number(gold)
    if value is None or gold_value is None:
        return None
    if answer.endswith("%") and not gold.endswith("%"):
        return near(value, gold_value) or near(value / 100, gold_value)
    if gold.endswith("%") and not answer.endswith("%"):
        return near(value, gold_value) or near(100 * value, gold_value)
    return near(value, gold_value)


def near(value: Fraction, gold: Fraction) -> bool:
    """Within a millionth, and to six significant digits: 0.166667 is 1/6, and nothing but 0 is near 0."""
    return abs(value - gold) <= min(_MILLIONTH, 5 * _MILLIONTH * max(abs(value), abs(gold)))


def _mixed(match: re.Match[str]) -> Fraction | None:
    """`7 1/2`, whose fraction is less than one: `7 3/2` may be a product."""
    sign, whole, *parts = match.groups()
    top, bottom = (int(part) for part in parts if part is not None)
    if not 0 < top < bottom:
        return None
    value = int(whole) + Fraction(top, bottom)
    return -value if sign == "-" else value


def _decimal(text: str) -> Fraction | None:
    if len(text) > _MAX_DIGITS:
        return None
    if power := _POWER_OF_TEN.fullmatch(text):
        sign, *exponents = power.groups()
        return _value(sign, "1", "", exponents)
    matched = _NUMBER.fullmatch(text)
    if not matched:
        return None
    sign, whole, decimals, *exponents = matched.groups()
    if not whole and not decimals:
        return None
    return _value(sign, whole or "0", decimals or "0", exponents)


def _value(sign: str, whole: str, decimals: str, exponents: list[str | None]) -> Fraction | None:
    power = next((int(exponent) for exponent in exponents if exponent), 0)
    if abs(power) > _MAX_EXPONENT:
        return None
    digits = whole.replace(",", "").replace("{", "").replace("}", "")
    value = Fraction(f"{digits}.{decimals or '0'}") * Fraction(10) ** power
    return -value if sign == "-" else value
