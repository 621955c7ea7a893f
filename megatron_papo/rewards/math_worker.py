"""The process that runs math-verify, so that the trainer never does. Run as a script; imports nothing of the package.

It has no threads and no torch, so it can fork: a child does the comparing, and a timer of the kernel ends the child
when a comparison takes too long, in whatever C code it is. The parent then forks another, at no import's cost. One
request a line on standard input, one JSON value a line on standard output: true, false, or null when time ran out,
memory did, or math-verify crashed.
"""

import json
import logging
import os
import resource
import signal
import sys

_MEMORY = 4 << 30  # bytes of address space: 9^{9^9} would take all there is before its time is out


def main() -> None:
    """Serves until standard input ends; the only argument is the limit in seconds."""
    timeout_s = float(sys.argv[1])
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the trainer decides when to end
    compare("\\frac{1}{2}", "x+1")  # fills math-verify's caches before the first fork
    child = Child(timeout_s)
    if child.ask(json.dumps(["2\\sqrt{3}", "\\sqrt{12}"])) != "true":
        sys.exit("math-verify does not know that 2\\sqrt{3} is \\sqrt{12}")
    _write(sys.stdout.fileno(), "ready")
    for line in sys.stdin:
        reply = child.ask(line)
        if reply is None:
            child.close()
            child = Child(timeout_s)
        _write(sys.stdout.fileno(), reply or "null")


class Child:
    """A fork of this process that compares, until a comparison outlasts the timer."""

    def __init__(self, timeout_s: float) -> None:
        requests, self._requests = os.pipe()
        self._replies, replies = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._requests)
            os.close(self._replies)
            try:
                _compare_forever(requests, replies, timeout_s)
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


def _compare_forever(requests: int, replies: int, timeout_s: float) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the default ends the process
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    memory = _MEMORY if hard == resource.RLIM_INFINITY else min(_MEMORY, hard)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.set_int_max_str_digits(4300)
    for line in os.fdopen(requests):
        answer, gold = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        try:
            right = compare(answer, gold)
        except (Exception, RecursionError, MemoryError):
            right = None  # sympy and its parser raise anything
        signal.setitimer(signal.ITIMER_REAL, 0)
        _write(replies, json.dumps(right))


def compare(answer: str, gold: str) -> bool:
    """Whether math-verify calls the two equal; its own timers are off."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    kinds = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    parsed_gold, parsed_answer = (
        parse(f"\\boxed{{{text}}}", kinds, fallback_mode="no_fallback", parsing_timeout=None) for text in (gold, answer)
    )
    return bool(
        verify(parsed_gold, parsed_answer, float_rounding=6, allow_set_relation_comp=True, timeout_seconds=None)
    )


def _write(descriptor: int, line: str) -> None:
    os.write(descriptor, line.encode() + b"\n")  # a line fits the pipe: both strings are capped


if __name__ == "__main__":
    main()
