"""Rewards that disturb a tiny run: one takes a moment, one waits for leave, one needs a token, one fails at the same
step every time, one stalls once."""

from __future__ import annotations

import itertools
import os
import time
from contextlib import suppress
from pathlib import Path

from tests.support.tiny_run import share_of_even_bytes

_calls = itertools.count(1)
"""Numbers the calls in this process."""


def slow_share(response: str, answer: str, problem: str) -> float:
    time.sleep(0.1)
    return share_of_even_bytes(response, answer, problem)


def waits_for_leave(response: str, answer: str, problem: str) -> float:
    """A reward that waits until a file of this name lies in this folder."""
    while not Path("leave").exists():
        time.sleep(0.1)
    return share_of_even_bytes(response, answer, problem)


def share_with_a_token(response: str, answer: str, problem: str) -> float:
    """A reward whose judge wants JUDGE_TOKEN."""
    assert len(os.environ["JUDGE_TOKEN"]) > 10
    return share_of_even_bytes(response, answer, problem)


def fails_at_a_step(response: str, answer: str, problem: str) -> float:
    """A reward that fails in the third step of every process that asks for six rewards per step."""
    if next(_calls) > 12:
        raise OSError("the verifier's host is down")
    return share_of_even_bytes(response, answer, problem)


def stalls_once(response: str, answer: str, problem: str) -> float:
    """The first process that asks for its thirteenth reward, of all that work in this folder, never gets it."""
    if next(_calls) == 13:
        with suppress(FileExistsError):
            Path("stalled").mkdir()
            time.sleep(600)
    return share_of_even_bytes(response, answer, problem)
