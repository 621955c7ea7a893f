"""Addresses of the separate engines, their deaths and their ends, in the store that all ranks share.

An engine that dies is started again under a new address; restarts are counted from 0. Keys are `engine.restart`.
"""

from __future__ import annotations

import json
import socket
import time
from dataclasses import asdict, dataclass

import torch.distributed as dist

_POLL_S = 0.1


@dataclass(frozen=True)
class Address:
    """Where the first rank of an engine listens."""

    host: str
    port: int


@dataclass(frozen=True)
class EngineRank:
    """One rank of one restart of an engine: which of the engine processes this one is."""

    engine: int
    rank: int
    """Its rank among the engine's `generation.tensor`."""
    restart: int
    """How often the engine has been started again; 0 at first."""


class EngineStore:
    """The engines' part of the store; every call may raise torch.distributed's error of a store that is gone."""

    def __init__(self, store: dist.Store):
        self._store = dist.PrefixStore("engines", store)

    def publish_key(self, fingerprint: str) -> None:
        """Publishes the fingerprint of the engines' key; the key itself is in a file (run_key.py)."""
        self._store.set("key", fingerprint)

    def key_fingerprint(self) -> str:
        """The fingerprint that `publish_key` left; waits for it as long as the store exists."""
        while (fingerprint := self._get("key")) is None:
            time.sleep(_POLL_S)
        return fingerprint

    def announce(self, engine: int, restart: int, address: Address) -> None:
        """Says where this restart of the engine takes connections from now on."""
        self._store.set(f"address/{engine}.{restart}", json.dumps(asdict(address)))

    def note_death(self, engine: int, restart: int, reason: str) -> None:
        """Says that a rank of the engine died; of several reasons the first stays."""
        self._store.compare_set(f"death/{engine}.{restart}", "", reason)

    def death(self, engine: int, restart: int, wait_s: float = 0.0) -> str | None:
        """Why the engine died; None where nobody says so within `wait_s` seconds."""
        deadline = time.monotonic() + wait_s
        while (reason := self._get(f"death/{engine}.{restart}")) is None and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        return reason

    def address(self, engine: int, restart: int) -> Address | None:
        """Where this restart of the engine takes connections; None as long as it has not announced itself."""
        text = self._get(f"address/{engine}.{restart}")
        return None if text is None else Address(**json.loads(text))

    def living(self, engine: int, restart: int, wait_s: float) -> tuple[int, Address]:
        """The engine's first restart, from `restart` on, that has announced itself and has not died; waits for it.

        Raises TimeoutError after `wait_s` seconds.
        """
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline:
            if self.death(engine, restart) is not None:
                restart += 1
                continue
            address = self.address(engine, restart)
            if address is not None:
                return restart, address
            time.sleep(_POLL_S)
        raise TimeoutError(f"engine {engine} did not come up within {wait_s:.0f} s")

    def stop(self) -> None:
        """Tells all engines that no more calls will come."""
        self._store.set("stop", "1")

    @property
    def stopping(self) -> bool:
        """Whether `stop` was called."""
        return self._get("stop") is not None

    def note_end(self) -> None:
        """Counts one rank of an engine that has ended after `stop`."""
        self._store.add("ended", 1)

    def wait_for_ends(self, num_ranks: int, wait_s: float) -> None:
        """Waits, at most `wait_s` seconds, until `num_ranks` ranks have ended.

        Until then they read the store, which ends with rank 0.
        """
        deadline = time.monotonic() + wait_s
        while self._store.add("ended", 0) < num_ranks and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def _get(self, key: str) -> str | None:
        return self._store.get(key).decode() if self._store.check([key]) else None


def own_host(other: str) -> str:
    """The address from which this machine reaches `other`: other ranks can reach it there."""
    *_, target = socket.getaddrinfo(other, 1, socket.AF_INET, socket.SOCK_DGRAM)[0]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # nothing is sent
        probe.connect(target)
        return probe.getsockname()[0]
