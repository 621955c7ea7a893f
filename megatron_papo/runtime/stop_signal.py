"""SIGUSR1 requests that a run saves and ends after its current step; a cluster job gets it before its time limit.

A signal that came while the run was starting counts too: the run then ends after its first step.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Self

from megatron_papo.distributed.exchange import any_rank
from megatron_papo.runtime.process import save_requested


class StopSignal:
    """A context that handles SIGUSR1. All ranks call `requested` after each step, so that all stop after the same."""

    def __init__(self) -> None:
        self._received = False

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGUSR1, self._handle)
        self._received = self._received or save_requested()
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGUSR1, self._before)

    def requested(self) -> bool:
        """Whether any rank has received the signal; collective."""
        return any_rank(self._received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._received = True
