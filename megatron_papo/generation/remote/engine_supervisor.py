"""The supervisor on a rank of a separate engine: it starts the engine in a child process, and again whenever it dies.

The supervisor does little that can fail. What kills an engine (out of memory, an exception in vLLM, a signal) is seen
here and noted in the store, and the engine is restarted; the trainer then hands its weights over and repeats its call
(remote_generator.py). How many restarts a run allows is the trainer's decision. An engine that dies before it has
announced itself would die again: that ends the run with its reason.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

from megatron_papo.config import Config
from megatron_papo.distributed.rendezvous import world_store
from megatron_papo.generation.remote.engine_process import EngineEnding, run_engine
from megatron_papo.generation.remote.engine_store import EngineRank, EngineStore
from megatron_papo.runtime.process import save_requests_blocked

_POLL_S = 0.25
_END_S = 10.0
"""Seconds that an engine may take to end once the trainer has stopped it; one that is still starting gets none, since
it does not read messages yet."""


def keep_engine(config: Config, place: int) -> None:
    """Runs the engine rank at `place` among all engine ranks; returns once the trainer has stopped the engines.

    Raises ValueError or RuntimeError, with its reason, for an engine that cannot start.
    """
    engine, rank = divmod(place, config.generation.tensor)
    store = EngineStore(world_store(config.parallel.timeout_s))
    for restart in itertools.count():
        engine_rank = EngineRank(engine, rank, restart)
        with _Child(config, engine_rank) as child:
            reason = _watch(child, store)
        if reason is None:
            with suppress(RuntimeError):  # the store is gone already
                store.note_end()
            return
        started = store.address(engine, restart) is not None
        store.note_death(engine, restart, reason)
        if not started:
            _raise(child.ending, f"engine {engine} did not start: {reason}")


@dataclass
class _Child:
    """The process of one restart of the engine. Use it as a context."""

    config: Config
    engine_rank: EngineRank
    ending: EngineEnding | None = None

    def __enter__(self) -> _Child:
        context = multiprocessing.get_context("spawn")  # CUDA and vLLM do not survive a fork
        self._receiver, sender = context.Pipe(duplex=False)
        self.process = context.Process(target=run_engine, args=(self.config, self.engine_rank, sender))
        with save_requests_blocked():  # until the child handles that signal
            self.process.start()
        sender.close()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.join()
        self._receiver.close()

    def reason(self) -> str | None:
        """Why the process ended; None when it ended well. Waits for its end."""
        self.process.join()
        if self.process.exitcode == 0:
            return None
        self.ending = _received(self._receiver)
        if self.ending is not None:
            return self.ending.text
        code = self.process.exitcode or 0
        return f"signal {-code}" if code < 0 else f"exit code {code}"


def _watch(child: _Child, store: EngineStore) -> str | None:
    """Waits until the engine has ended, on this rank or on another of its ranks.

    Returns the reason; None where the trainer stopped it.
    """
    process: SpawnProcess = child.process
    while not wait([process.sentinel], timeout=_POLL_S):
        try:
            death, stopping = store.death(child.engine_rank.engine, child.engine_rank.restart), store.stopping
        except RuntimeError:  # the store is gone, and the trainer with it
            if wait([process.sentinel], timeout=_END_S) and child.reason() is None:
                return None
            raise
        if death is not None:
            return death
        if stopping:
            started = store.address(child.engine_rank.engine, child.engine_rank.restart) is not None
            wait([process.sentinel], timeout=_END_S if started else 0)
            return None
    reason = child.reason()
    return None if reason is not None and store.stopping else reason


def _received(receiver: Connection) -> EngineEnding | None:
    """What the child sent before its end; None where it sent nothing."""
    try:
        return EngineEnding(**json.loads(receiver.recv_bytes())) if receiver.poll() else None
    except EOFError:
        return None


def _raise(ending: EngineEnding | None, text: str) -> None:
    if ending is not None and ending.is_users:
        raise ValueError(text)
    raise RuntimeError(text)
