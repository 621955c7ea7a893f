"""Finding the answer in a response, and the cheap rules that settle most comparisons: text, choice, unit, number.

Every function here is linear in a capped length, so that no answer can cost time. `agree` says True or False where a
rule applies; where it takes algebra, it gives what is left to ask of math-verify (`verifier`). What the rules decide
beyond equality:

- numbers: 1,000 = 1000, 1e3 = 1000, 1/2 = 0.5 = 50\\%, 7 1/2 = 7.5, and 50\\% = 50; within a millionth, and
  to six significant digits, so that 0.333333 = 1/3 and 2e-7 is not 1e-7;
- units: 24 cm^2 = 24 and never 24 kg (`units`);
- choices: where the gold answer is one letter, A = (A) = A. 30 = \\text{A} = Option A; several letters are a set, so
  AC = A, C = C and A = \\{A,C\\}, unless the gold answer has them in another order than the alphabet's. Three and more
  written together are a name in their own order: angle BAC is not ABC;
- words of three letters and more are words, compared without case, not products of variables;
- dates are compared number by number, and are no differences.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from megatron_papo.rewards.numerals import equal_numbers
from megatron_papo.rewards.spelling import plain, spell
from megatron_papo.rewards.units import Unit, clash, split_units

MAX_ANSWER = 200
"""Characters of a box; a longer one is no answer."""
MAX_DEPTH = 12
"""Nested braces of a box."""
_MAX_READ = 1000
"""Letters of a gold answer, and of any answer in its one spelling."""

_BRACKETED = re.compile(r"\(([A-J])\)[.:]? ?(.*)", re.DOTALL)
_BARE = re.compile(r"([A-J])(?:$|[).](?![A-Z](?![a-z])) ?(.*)|(?<=[A-E]):(?![A-Z]) ?(.*))", re.DOTALL)
_CHOICE_WORD = re.compile(
    r"(?:(?:the )?(?:correct )?(?:option|choice|answer)s?(?: is| are)?|both|选项?|答案[是为]?)[ :]*"
    r"(?=[(\[{\\A-Ja-j])",
    re.IGNORECASE,
)
_MORE_CHOICES = re.compile(r"^(?:and\b|or\b|[,;&/])|^\(?[A-J][).:,]|[,;] ?\(?[A-J] ?[).:=]|\([A-J]\)")
_SPECIES = ("coli", "elegans", "melanogaster", "subtilis", "aureus", "thaliana", "cerevisiae", "rerio", "pylori")
"""After an abbreviated genus: E. coli is no choice."""
_CHOICES = re.compile(r"\(?[A-J]\)?(?:(?: ?[,;&] ?(?:and )?| and | )?\(?[A-J]\)?)+")
_RUN_OF_CHOICES = re.compile(r"[A-J]{3,}")
_IN_BRACKETS = re.compile(r"\\?\{(.*)\\?\}|\[(.*)\]", re.DOTALL)
_WORDS = re.compile(r"[^\W\d_]{3,}(?:[ '’-]+[^\W\d_]+)*|[Nn]o")
_DATE = re.compile(r"(\d{1,4})([-/.])(\d{1,2})\2(\d{1,4})")
_DIGIT = re.compile(r"\d")
_FULL_DATE = re.compile(r"\d{4}-\d{1,2}-\d{1,2}|\d{1,2}-\d{1,2}-\d{4}")
_SPACE = re.compile(r"(?<!\d) +| +(?!\d)")


class Algebra(NamedTuple):
    """What the rules leave to math-verify, as LaTeX and without units."""

    answer: str
    gold: str


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


def agree(answer: str, gold: str) -> bool | Algebra:
    """Whether the rules call `answer` right, or what is left to ask. Nothing agrees with an empty answer."""
    if not answer.strip() or not gold.strip() or not " ".join(answer.split()).isprintable():
        return False  # control characters and halves of surrogates are no answer
    read, read_gold = _read(answer[:_MAX_READ]), _read(gold[:_MAX_READ])
    if not read.text or not read_gold.text:
        return False
    if max(map(len, (gold, read.text, read_gold.text))) > _MAX_READ:
        return answer == gold  # nobody writes such an answer; some signs of Unicode stand for a whole sentence
    for rule in (_same_text, _same_choice, _same_words, _same_date):
        verdict = rule(read.text, read_gold.text)
        if verdict is not None:
            return verdict
    if clash(read.units, read_gold.units):
        return False
    value, gold_value = read.value, read_gold.value
    verdict = _same_text(value, gold_value)
    if verdict is None:
        verdict = equal_numbers(value, gold_value)
    return Algebra(_for_math_verify(value), _for_math_verify(gold_value)) if verdict is None else verdict


def kind_of_answer(answer: str) -> str:
    """What a gold answer seems to be, in words: of the rules above the first that could settle it."""
    text = plain(spell(gold_answer(answer)[:_MAX_READ]))
    value = _read(text).value
    kinds = {
        "one choice": _choice(text),
        "several choices": _several_choices(text),
        "words": _WORDS.fullmatch(text),
        "date": _FULL_DATE.fullmatch(text),
        "number": equal_numbers(value, value),
        "expression": re.search(r"[\\^=<>{}+*/]|\d", text),
    }
    return next((kind for kind, found in kinds.items() if found), "other text")


class _Reading(NamedTuple):
    text: str
    value: str
    """The text without its units."""
    units: frozenset[Unit]


@lru_cache(maxsize=4096)
def _read(answer: str) -> _Reading:
    """Answers of a group, and its gold answer, are read once."""
    spelled = spell(answer)
    text = plain(spelled)
    if len(text) > _MAX_READ:
        return _Reading(text, text, frozenset())
    value, units = split_units(spelled)
    return _Reading(text, plain(value), units)


def _same_text(answer: str, gold: str) -> bool | None:
    """True or unknown. No space matters but that between two numbers."""
    return True if answer == gold or _SPACE.sub("", answer) == _SPACE.sub("", gold) else None


def _same_choice(answer: str, gold: str) -> bool | Algebra | None:
    """By the letter, and by the text where both give numbers; several choices by their letters."""
    choice, gold_choice = _choice(answer, any_case=True), _choice(gold)
    if choice and gold_choice:
        (letter, text), (gold_letter, gold_text) = choice, gold_choice
        if letter == gold_letter and _DIGIT.search(text) and _DIGIT.search(gold_text):
            return agree(text, gold_text)  # F: 20 N is not F: 30 N
        return letter == gold_letter
    letters, gold_letters = _several_choices(answer, any_case=True), _several_choices(gold)
    if letters is None or gold_letters is None:
        return None
    if letters == gold_letters:
        return True
    is_set = list(gold_letters) == sorted(set(gold_letters)) and not _RUN_OF_CHOICES.fullmatch(answer)
    return sorted(letters) == list(gold_letters) if is_set else None


def _several_choices(text: str, *, any_case: bool = False) -> str | None:
    """The letters of several choices in their order: `AC`, `A, C`, `{A,C}`, `Options A and C`; None for anything else.
    `any_case`: small letters too, where signs or words part them."""
    text = _CHOICE_WORD.sub("", text, count=1) if _CHOICE_WORD.match(text) else text
    if brackets := _IN_BRACKETS.fullmatch(text):
        text = (brackets[1] or brackets[2] or "").removesuffix("\\").strip()
    if any_case and re.fullmatch(r"[a-j](?:[ ,;&]+(?:and )?[a-j])+", text):
        text = re.sub(r"\b[a-j]\b", lambda letter: letter[0].upper(), text)
    return "".join(re.findall("[A-J]", text)) if _CHOICES.fullmatch(text) else None


def _choice(text: str, *, any_case: bool = False) -> tuple[str, str] | None:
    """Letter and text of a single choice: `A`, `(A)`, `A. 30`, `Option A`; None for anything else."""
    text = _CHOICE_WORD.sub("", text, count=1) if _CHOICE_WORD.match(text) else text
    if any_case and re.fullmatch(r"[a-j]|\([a-j]\)", text):
        text = text.upper()
    match = _BRACKETED.fullmatch(text) or _BARE.fullmatch(text)
    if not match:
        return None
    letter, *texts = match.groups()
    text = next((text.strip() for text in texts if text), "")
    return None if text in _SPECIES or _MORE_CHOICES.search(text) else (letter, text)


def _same_words(answer: str, gold: str) -> bool | None:
    return answer.casefold() == gold.casefold() if _WORDS.fullmatch(answer) and _WORDS.fullmatch(gold) else None


def _same_date(answer: str, gold: str) -> bool | None:
    date, gold_date = _DATE.fullmatch(answer), _DATE.fullmatch(gold)
    if not date or not gold_date:
        return False if _FULL_DATE.fullmatch(answer) or _FULL_DATE.fullmatch(gold) else None
    return [int(date[part]) for part in (1, 3, 4)] == [int(gold_date[part]) for part in (1, 3, 4)]


def _for_math_verify(text: str) -> str:
    return text.replace("%", "\\%")
