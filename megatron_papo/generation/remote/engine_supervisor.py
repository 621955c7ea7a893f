"""A rank of a separate engine: starts the engine proper in a process of its own, watches it, and starts it again.

This process does little that can fail, so what kills an engine (out of memory, an exception in vLLM, a signal) is
seen here, said in the store, and followed by the engine's next restart; the trainer then hands its weights over
and asks again (separate.py). Who may restart how often is the trainer's to say. An engine that dies before it could
be asked for the first time would die again: that ends the run with its reason.
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
from megatron_papo.generation.remote.engine_process import EngineEnding, EngineRank, run_engine
from megatron_papo.generation.remote.engine_store import EngineStore
from megatron_papo.runtime.process import save_requests_held

_POLL_S = 0.25
_END_S = 10.0
"""From the trainer's goodbye to the end of the engine; one that is still starting does not hear it."""


def keep_engine(config: Config, place: int) -> None:
    """The whole life of the engine rank at `place` among all of them; returns when the trainer has said goodbye.

    Raises ValueError or RuntimeError with the reason of an engine that cannot start.
    """
    engine, rank = divmod(place, config.generation.tensor)
    store = EngineStore(world_store(config.parallel.timeout_s))
    for restart in itertools.count():
        engine_rank = EngineRank(engine, rank, restart)
        with _Child(config, engine_rank) as child:
            reason = _watch(child, store)
        if reason is None:
            with suppress(RuntimeError):  # of a store that has not waited for us
                store.note_end()
            return
        started = store.address(engine, restart) is not None
        store.note_death(engine, restart, reason)
        if not started:
            _raise(child.ending, f"engine {engine} did not start: {reason}")


@dataclass
class _Child:
    """The engine proper of one restart."""

    config: Config
    engine_rank: EngineRank
    ending: EngineEnding | None = None

    def __enter__(self) -> _Child:
        context = multiprocessing.get_context("spawn")  # CUDA and vLLM do not survive a fork
        self._hears, says = context.Pipe(duplex=False)
        self.process = context.Process(target=run_engine, args=(self.config, self.engine_rank, says))
        with save_requests_held():  # until it expects them
            self.process.start()
        says.close()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.join()
        self._hears.close()

    def reason(self) -> str | None:
        """Why it ended; None when it ended well."""
        self.process.join()
        if self.process.exitcode == 0:
            return None
        self.ending = _last_words(self._hears)
        if self.ending is not None:
            return self.ending.text
        code = self.process.exitcode or 0
        return f"signal {-code}" if code < 0 else f"exit code {code}"


def _watch(child: _Child, store: EngineStore) -> str | None:
    """Until the engine has ended, on this rank or another of it; the reason, None for the trainer's goodbye."""
    process: SpawnProcess = child.process
    while not wait([process.sentinel], timeout=_POLL_S):
        try:
            elsewhere, stopping = store.death(child.engine_rank.engine, child.engine_rank.restart), store.stopping
        except RuntimeError:  # the store is gone, and the trainer with it
            if wait([process.sentinel], timeout=_END_S) and child.reason() is None:
                return None
            raise
        if elsewhere is not None:
            return elsewhere
        if stopping:
            started = store.address(child.engine_rank.engine, child.engine_rank.restart) is not None
            wait([process.sentinel], timeout=_END_S if started else 0)
            return None
    reason = child.reason()
    return None if reason is not None and store.stopping else reason


def _last_words(hears: Connection) -> EngineEnding | None:
    try:
        return EngineEnding(**json.loads(hears.recv_bytes())) if hears.poll() else None
    except EOFError:
        return None


def _raise(ending: EngineEnding | None, text: str) -> None:
    if ending is not None and ending.is_users:
        raise ValueError(text)
    raise RuntimeError(text)
