"""A reward that takes a moment, so that a tiny run lasts long enough to be disturbed."""

from __future__ import annotations

import time

from tests.tiny_run import share_of_even_bytes


def slow_share(response: str, answer: str, problem: str) -> float:
    time.sleep(0.1)
    return share_of_even_bytes(response, answer, problem)
