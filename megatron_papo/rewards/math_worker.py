"""The process that runs math-verify or mathruler, so that the trainer never does. Run as a script; imports nothing of
the package.

It has no threads and no torch, so it can fork: a child does the comparing, and a timer of the kernel ends the child
when a comparison takes too much of the processor, in whatever C code it is; a busy machine makes no answer wrong. The
parent then forks another, at no import's cost. One request a line on standard input, one JSON value a line on standard
output: true, false, or null when time ran out, memory did, or the grader crashed.
"""

import cmath
import json
import logging
import math
import os
import re
import resource
import signal
import sys
import unicodedata
from collections.abc import Callable
from typing import Any

Grader = Callable[[str, str], bool]
"""Whether an answer equals the gold answer: (answer, gold answer) -> bool."""
_WARM_UP = ("\\frac{1}{2}", "x+1"), ("(\\frac{1}{2}, 3)", "(0.5, 3)"), ("\\{1, 2\\}", "\\{2, 1\\}")
_TEXT = re.compile(r"""['"#\\]|\.\s*[^\W\d]""")
"""In Python: a text, or an attribute, of which some hold a text, also one that begins on the next line."""

_MEMORY = 4 << 30  # bytes of address space: 9^{9^9} would take all there is before its time is out
_SIX_DIGITS = 5.000001e-6  # six significant digits, and what doubles lose
_ZERO = 1e-90  # what thirty digits leave of an expression that is zero


def main() -> None:
    """Serves until standard input ends; the arguments are the limit in seconds and the grader."""
    timeout_s, grader = float(sys.argv[1]), {"math-verify": compare, "mathruler": grade}[sys.argv[2]]
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the trainer decides when to end
    for answer, gold in _WARM_UP:  # imports all, and fills caches, before the first fork
        grader(answer, gold)
    child = Child(timeout_s, grader)
    if child.ask(json.dumps(["2\\sqrt{3}", "\\sqrt{12}"])) != "true":
        sys.exit(f"{sys.argv[2]} does not know that 2\\sqrt{3} is \\sqrt{12}")
    _write(sys.stdout.fileno(), "ready")
    for line in sys.stdin:
        reply = child.ask(line)
        if reply is None:
            child.close()
            child = Child(timeout_s, grader)
        _write(sys.stdout.fileno(), reply or "null")


class Child:
    """A fork of this process that compares, until a comparison outlasts the timer."""

    def __init__(self, timeout_s: float, grader: Grader) -> None:
        requests, self._requests = os.pipe()
        self._replies, replies = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._requests)
            os.close(self._replies)
            try:
                _compare_forever(requests, replies, timeout_s, grader)
            finally:
                os._exit(0)
        os.close(requests)
        os.close(replies)
        self._lines = os.fdopen(self._replies)

    def ask(self, line: str) -> str | None:
        """The child's reply; None when it died over the question."""
        _write(self._requests, line.strip())
        return self._lines.readline().strip() or None

    def close(self) -> None:
        os.close(self._requests)
        self._lines.close()
        os.waitpid(self._pid, 0)


def _compare_forever(requests: int, replies: int, timeout_s: float, grader: Grader) -> None:
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # the default ends the process
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    memory = _MEMORY if hard == resource.RLIM_INFINITY else min(_MEMORY, hard)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # writes no file, whatever an answer makes of it
    sys.set_int_max_str_digits(4300)
    for line in os.fdopen(requests):
        answer, gold = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, timeout_s)
        try:
            right = grader(answer, gold)
        except (Exception, RecursionError, MemoryError):
            right = None  # sympy and the parsers raise anything
        signal.setitimer(signal.ITIMER_PROF, 0)
        _write(replies, json.dumps(right))


def compare(answer: str, gold: str) -> bool:
    """Whether math-verify calls the two equal and their numbers are not apart; its own timers are off.

    It leaves units alone, which are gone from both, and would take a variable for one: the h of 2\\pi r h.
    """
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    spelling = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all")
    kinds = [LatexExtractionConfig(boxed_match_priority=0, normalization_config=spelling), ExprExtractionConfig()]
    parsed_gold, parsed_answer = (
        parse(f"\\boxed{{{text}}}", kinds, fallback_mode="no_fallback", parsing_timeout=None) for text in (gold, answer)
    )
    equal = verify(parsed_gold, parsed_answer, float_rounding=6, allow_set_relation_comp=True, timeout_seconds=None)
    return bool(equal) and not apart(parsed_gold[0], parsed_answer[0])


def grade(answer: str, gold: str) -> bool:
    """mathruler's verdict. It evaluates as Python what has at most two unknown letters. A text within would be
    evaluated in its turn, and may spell any program, by its letters' numbers or as letters cut from an attribute such
    as `__doc__`: nothing with a quotation mark or an attribute is, in Python's own reading of Unicode."""
    from mathruler import grader

    if not hasattr(grader, "parse_any"):
        grader.parse_any, grader._sympy_parse = grader._sympy_parse, _parse_without_texts
    return bool(grader.grade_answer(answer, gold))


def _parse_without_texts(expression: str) -> Any:
    from mathruler import grader

    if _TEXT.search(unicodedata.normalize("NFKC", expression)):
        raise ValueError("a text is no mathematics")  # which mathruler takes for a wrong answer
    return grader.parse_any(expression)


def apart(gold: Any, answer: Any) -> bool:
    """Whether two expressions that math-verify calls equal differ in their first six digits.

    It rounds to six places, and so takes all tiny numbers for one. Members of sets, tuples and intervals are compared
    one by one; equations other than `x = …`, inequalities and percentages, which have two values, are left to it.
    """
    from sympy import Equality, FiniteSet, Rational
    from sympy.core.expr import UnevaluatedExpr

    gold, answer = (one.rhs if isinstance(one, Equality) and one.lhs.is_Symbol else one for one in (gold, answer))
    gold_members, members = _members(gold), _members(answer)
    if len(members) != len(gold_members) or gold.has(UnevaluatedExpr) or answer.has(UnevaluatedExpr):
        return False
    symbols = set().union(*(one.free_symbols for one in (*members, *gold_members)))
    names = sorted({str(symbol) for symbol in symbols})  # one name may stand for a real and a complex symbol
    point = {symbol: Rational(13 + 7 * names.index(str(symbol)), 10) for symbol in symbols}
    values, gold_values = ([_value(member, point) for member in some] for some in (members, gold_members))
    if isinstance(gold, FiniteSet) or isinstance(answer, FiniteSet):
        values, gold_values = sorted(values, key=_order), sorted(gold_values, key=_order)
    return any(
        abs(value - of) > _SIX_DIGITS * max(abs(value), abs(of)) + _ZERO for value, of in zip(values, gold_values)
    )


def _members(expression: Any) -> list[Any]:
    from sympy import FiniteSet, Interval, MatrixBase, Tuple

    if isinstance(expression, MatrixBase):
        return list(expression.flat())
    if isinstance(expression, Interval):
        return [expression.start, expression.end]
    return list(expression.args) if isinstance(expression, (FiniteSet, Tuple)) else [expression]


def _value(expression: Any, point: dict[Any, Any]) -> complex:
    """At the point; not a number for what has no finite value, which is apart from nothing."""
    try:
        value = complex(expression.subs(point).doit().evalf(30))
    except (TypeError, ValueError, AttributeError, OverflowError):
        return complex(math.nan)
    return value if cmath.isfinite(value) else complex(math.nan)


def _order(value: complex) -> tuple[float, float]:
    return value.real, value.imag


def _write(descriptor: int, line: str) -> None:
    os.write(descriptor, line.encode() + b"\n")  # a line fits the pipe: both strings are capped


if __name__ == "__main__":
    main()
