"""SIGUSR1 asks a run to save after the step it is in and to end; a cluster job gets it before its time limit.

One that came while the run was starting counts too: the run ends after its first step.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Self

from megatron_papo.distributed.exchange import any_rank
from megatron_papo.runtime.process import asked_to_save


class StopSignal:
    """As a context: listens. Every rank asks after every step, so that all of them stop after the same one."""

    def __init__(self) -> None:
        self._heard = False

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGUSR1, self._hear)
        self._heard = self._heard or asked_to_save()
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGUSR1, self._before)

    def asked(self) -> bool:
        """Whether any rank has been asked to stop; collective."""
        return any_rank(self._heard)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._heard = True
