"""The line between a rank of the trainer and a separate engine: what is said over it, and a thread that listens.

A thread reads every message as it comes, so that neither end's sending waits for the other's work. The end of a line
is a message too. Messages are pickled by the standard library's connections, which ask for a secret first.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

import torch

from megatron_papo.generation.base import Sampling
from megatron_papo.generation.shares import Answer, Job


@dataclass(frozen=True)
class Generate:
    """To the engine: rollouts to make. A later call is another number."""

    call: int
    jobs: tuple[Job, ...]
    requests: dict[int, dict[str, Any]]
    """By the jobs' prompt_index."""
    sampling: Sampling


@dataclass(frozen=True)
class Progress:
    """From the engine, now and then."""

    call: int
    done: int
    total: int


@dataclass(frozen=True)
class Answers:
    """From the engine: all of a call."""

    call: int
    answers: tuple[Answer, ...]
    policy_version: int
    seconds: float
    """From the call's arrival to its last answer."""
    prefix_cached: tuple[float, float]
    """Prompt tokens that were read before, of all."""


@dataclass(frozen=True)
class Load:
    """To the engine, from rank 0 alone: weights follow over the bridge of this name, as `Bucket`s say."""

    policy_version: int
    bridge: str


@dataclass(frozen=True)
class Bucket:
    """To the engine: what the next broadcast over the bridge holds, laid end to end."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Loaded:
    """To the engine, after the last bucket; and its answer, with what was wrong with the weights."""

    fault: str | None = None


@dataclass(frozen=True)
class Bye:
    """To the engine: this rank hangs up and nothing is wrong."""


@dataclass(frozen=True)
class Stop:
    """To the engine, from rank 0 alone: nobody will ask any more."""


class Line:
    """One end of a connection. Messages go to `inbox` as (this line, message), its end as (this line, None)."""

    def __init__(
        self, connection: Connection, inbox: SimpleQueue[tuple[Line, Any]], on_end: Callable[[], None] | None = None
    ):
        """`on_end` is called by the listening thread, once, before the end goes to the inbox."""
        self._connection, self._inbox, self._on_end = connection, inbox, on_end
        self._thread = threading.Thread(target=self._listen, name="line", daemon=True)
        self._thread.start()

    def send(self, message: Any) -> None:
        """Says nothing of an end that is gone: the inbox does."""
        with suppress(OSError):
            self._connection.send(message)

    def close(self) -> None:
        """Hangs up: the other end hears of it at once, and the listening thread ends."""
        # closing alone would wait for the thread that reads
        with suppress(OSError), socket.socket(fileno=os.dup(self._connection.fileno())) as end:
            end.shutdown(socket.SHUT_RDWR)

    def _listen(self) -> None:
        try:
            while True:
                self._inbox.put((self, self._connection.recv()))
        except (OSError, EOFError):
            pass
        finally:  # a message that cannot be read ends the line too
            self._connection.close()
            if self._on_end is not None:
                self._on_end()
            self._inbox.put((self, None))
