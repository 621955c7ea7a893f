"""The unit at the end of an answer: `24\\text{ cm}^2` is 24, in cm².

A unit is what stands in the table, alone or as a product (`m/s^2`, `kg·m`, `square feet`, `千米/时`), after a value;
after a plain number also any noun (`5 apples`). A single letter that is not in upright text is a unit after a plain
number (`5m`), and most are after roots and multiples of pi (`5\\sqrt{3} m`); elsewhere it is a variable.
Nothing is converted: a question asks for its answer in one unit, and neither math-verify nor mathruler converts.
"""

from __future__ import annotations

import re

from megatron_papo.rewards.numerals import number
from megatron_papo.rewards.spelling import CLOSE, OPEN, plain
from megatron_papo.rewards.unit_names import (
    CHINESE,
    CHINESE_NO_UNITS,
    DERIVED,
    NO_UNITS,
    PER,
    POWERS,
    POWERS_AFTER,
    SYMBOLS,
    WORDS,
)

Unit = frozenset[tuple[str, int]]
"""Names of the table, or a noun, with their powers."""

_MOST_TOKENS = 40
"""Most tokens of a unit, blanks included."""
_HAN = "|".join(sorted([*CHINESE, "平方", "立方", "每"], key=len, reverse=True))
_TOKEN = re.compile(
    rf"(?P<degree>\^ ?(?:\\circ|\{{ ?\\circ ?\}}))|(?P<power>\^ ?(?:-?\d|\{{ ?-?\d ?\}}))|"
    rf"(?P<word>[APap]\.[Mm](?![A-Za-z])|[A-Za-z]?\\Omega|(?:\\mu ?)?[A-Za-z]+|\\\$|[€£¥¢₹Å]|{_HAN})|"
    rf"(?P<skip>\\cdot|[.*)}}{{ ])|(?P<slash>/)|(?P<open>[({OPEN}])|(?P<close>{CLOSE})|(?P<other>\\[A-Za-z]+|.)",
    re.DOTALL,
)
_IN_FRACTION = re.compile(r"\\frac ?\{([^{}]*)\} ?\{([^{}]*)\}$")
_COUNTED = re.compile(rf"(.*[\d)}}])([ {OPEN}]*)([^\W\d_]+(?:[ '-]+[^\W\d_]+)*)\.?[{CLOSE} ]*", re.DOTALL)
_NUMERIC = re.compile(r"(?:[\d. (){}^/]|\\(?:sqrt|pi|frac|times|cdot)(?![A-Za-z]))+")
_LAST_SIDE = re.compile(r".*(?:=|\\approx)", re.DOTALL)
_CURRENCY = re.compile(r"([+-]? ?)(\\\$|[€£¥₹]) ?(?=[\d.])")
_BETWEEN = re.compile(rf"([,;()\[\]]|\\[{{}}]|[ {OPEN}{CLOSE}]+(?:and|or)[ {OPEN}{CLOSE}]+)")
_LISTED = re.compile(rf"[,;]|[ {OPEN}](?:and|or)[ {CLOSE}]")
_VARIABLES = frozenset("htdl")
"""Letters that are variables after roots and multiples of pi: 2\\pi h."""
_PRODUCTS = frozenset(("mg", "cd", "pt", "ct", "lm", "ha", "sr", "pc", "M"))
"""Variables and products of them, as in a weight of 3mg, unless they stand in upright text."""


_SAME = [
    *({frozenset({("¥", 1)}), frozenset({(name, 1)})} for name in ("yuan", "yen")),
    *(
        {frozenset({(name, 1)}), frozenset(DERIVED[letter].items())}
        for name, letter in (("celsius", "C"), ("fahrenheit", "F"))
    ),
]
"""Pairs of units by one sign."""


def split_units(spelled: str) -> tuple[str, frozenset[Unit]]:
    """The answer without its units, and those; of a list, tuple or interval the units of every member."""
    if spelled[:1] == OPEN and spelled.find(CLOSE) == len(spelled) - 1:
        spelled = plain(spelled)  # all of it is upright text, which then says nothing
    value, unit = _split(spelled)
    if unit is None and not _LISTED.search(spelled):
        value, unit = _split_noun(spelled)
    if _LISTED.search(value) and (unit is None or value[-1] not in ")]"):
        return _split_members(spelled)
    if unit is None and value.endswith("%"):
        unit = frozenset({("%", 1)})
    return value, frozenset(() if unit is None else (unit,))


def _split_members(spelled: str) -> tuple[str, frozenset[Unit]]:
    """The text without the units of its members, and those units: of `3 cm and 4 cm` or `(3 m, 4 m)`."""
    units: set[Unit] = set()
    members = _BETWEEN.split(spelled)
    for index in range(0, len(members), 2):
        members[index], unit = _split(members[index])
        units |= set() if unit is None else {unit}
    return "".join(members), frozenset(units)


def clash(units: frozenset[Unit], gold_units: frozenset[Unit]) -> bool:
    """Whether both name units, and not the same. `units` alone fit any; a degree may be one of temperature, and C, F or
    ¥ either of two."""
    if not units or not gold_units or units == gold_units:
        return False
    if (units | gold_units) in _SAME:
        return False
    names, gold_names = ({name for unit in both for name, _ in unit} for both in (units, gold_units))
    if (names == {"unit"}) != (gold_names == {"unit"}):
        return False
    return {"degree"} not in (names, gold_names) or not (names | gold_names) <= {"degree", "celsius", "fahrenheit"}


def _split(text: str) -> tuple[str, Unit | None]:
    """By the table."""
    if currency := _CURRENCY.match(text):
        name = SYMBOLS[currency[2].removeprefix("\\")]
        return currency[1] + text[currency.end() :], frozenset({(name, 1)})
    if (fraction := _IN_FRACTION.search(text)) and _unit(list(_TOKEN.finditer(fraction[1]))):
        text = f"{text[: fraction.start()]}{OPEN}{fraction[1]}/{fraction[2]}{CLOSE}"
    tokens = list(_TOKEN.finditer(text))
    first = len(tokens)
    while first > max(0, len(tokens) - _MOST_TOKENS) and tokens[first - 1].lastgroup != "other":
        first -= 1
    for start in range(first, len(tokens)):
        if tokens[start].lastgroup in ("word", "degree", "open", "slash"):
            value, unit = text[: tokens[start].start()].rstrip(), _unit(tokens[start:])
            if unit is not None and _measures(value, tokens[start:]):
                return value, unit
    return text, None


def _unit(tokens: list[re.Match[str]]) -> Unit | None:
    """The product that the tokens name; None where one of them is no unit."""
    powers: dict[str, int] = {}
    last, sign, ahead = "", 1, 1
    for token in tokens:
        word = token[0].replace(" ", "").replace("\\mu", "µ").replace("\\Omega", "Ω").replace("\\", "")
        if token.lastgroup == "slash" or word.lower() in PER:
            last, sign = "", -1
        elif word.lower() in POWERS:
            ahead = POWERS[word.lower()]
        elif token.lastgroup == "power" or word in POWERS_AFTER:
            if not last:
                return None
            times = POWERS_AFTER.get(word) or int(word.strip("^{}"))
            powers[last], last = powers[last] + sign * ahead * (times - 1), ""
        elif token.lastgroup in ("word", "degree"):
            name = "degree" if token.lastgroup == "degree" else _named(word)
            if powers.keys() == {"degree"} and name in ("C", "F", "celsius", "fahrenheit"):
                powers, name = {}, {"C": "celsius", "F": "fahrenheit"}.get(name, name)
            if name is None:
                return None
            powers[name] = powers.get(name, 0) + sign * ahead
            last, ahead = name, 1
    if not powers or tokens[-1].lastgroup == "slash":
        return None
    return _in_base_units(powers)


def _named(word: str) -> str | None:
    small = word.lower()
    return (
        SYMBOLS.get(word)
        or CHINESE.get(word)
        or WORDS.get(small)
        or (WORDS.get(small.removesuffix("s")) if len(small) > 3 else None)
    )


def _in_base_units(powers: dict[str, int]) -> Unit:
    base_powers: dict[str, int] = {}
    for name, power in powers.items():
        for base, times in DERIVED.get(name, {name: 1}).items():
            base_powers[base] = base_powers.get(base, 0) + power * times
    return frozenset((name, power) for name, power in base_powers.items() if power)


def _measures(value: str, tokens: list[re.Match[str]]) -> bool:
    """Whether `value` can have what follows for its unit."""
    if not value or any(value.count(opens) != value.count(closes) for opens, closes in ("{}", "()", (OPEN, CLOSE))):
        return False
    upright = tokens[0].lastgroup == "degree" or tokens[0][0] == OPEN
    if not (value[-1].isdigit() or value[-1] in f")}}]!{CLOSE}" or value.endswith("\\pi")):
        return (upright and value[-1].isalpha()) or number(plain(value)) is not None  # 5 million
    words = [token[0] for token in tokens if token.lastgroup == "word"]
    loose = [word for word in words if (len(word) == 1 and word.isascii()) or word in _PRODUCTS]
    if upright or not loose:
        return True
    if len(words) == 1 and (words[0] in _PRODUCTS or (words[0] != "m" and tokens[-1].lastgroup == "power")):
        return False
    last_side = plain(_LAST_SIDE.sub("", value))
    return number(last_side) is not None or bool(_NUMERIC.fullmatch(last_side) and not _VARIABLES.intersection(words))


def _split_noun(text: str) -> tuple[str, Unit | None]:
    """`5 apples`, after a plain number; not `5 million`, `5 squared` or `5 or 6`."""
    counted = _COUNTED.fullmatch(text)
    if not counted or number(plain(counted[1])) is None:
        return text, None
    words = counted[3].casefold().split()
    if counted[3].isascii():
        if not counted[2] or not any(len(word) > 2 for word in words):
            return text, None
        if any(word in NO_UNITS or word.endswith(("th", "ths")) for word in words):
            return text, None
    elif CHINESE_NO_UNITS.intersection(counted[3]):
        return text, None
    return counted[1], frozenset({(" ".join(words).removesuffix("s"), 1)})
