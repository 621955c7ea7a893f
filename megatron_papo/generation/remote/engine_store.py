"""Where the separate engines are and how they fare, in the store that all ranks share.

An engine that dies is started again as its next restart, under a new address. Keys are `engine.restart`.
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


class EngineStore:
    """A view of the store; every call may raise torch.distributed's error of a store that is gone."""

    def __init__(self, store: dist.Store):
        self._store = dist.PrefixStore("engines", store)

    def publish_key(self, fingerprint: str) -> None:
        """Of the engines' key, which itself is in a file (separate_key.py)."""
        self._store.set("key", fingerprint)

    def key_fingerprint(self) -> str:
        """Waited for as long as the store is there."""
        while (found := self._get("key")) is None:
            time.sleep(_POLL_S)
        return found

    def announce(self, engine: int, restart: int, address: Address) -> None:
        """The engine can be asked from now on."""
        self._store.set(f"address/{engine}.{restart}", json.dumps(asdict(address)))

    def note_death(self, engine: int, restart: int, reason: str) -> None:
        """Of any of the engine's ranks; the first reason stays."""
        self._store.compare_set(f"death/{engine}.{restart}", "", reason)

    def death(self, engine: int, restart: int, wait_s: float = 0.0) -> str | None:
        """Why the engine died; None as long as nobody has said so, for `wait_s` at most."""
        deadline = time.monotonic() + wait_s
        while (reason := self._get(f"death/{engine}.{restart}")) is None and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        return reason

    def address(self, engine: int, restart: int) -> Address | None:
        found = self._get(f"address/{engine}.{restart}")
        return None if found is None else Address(**json.loads(found))

    def living(self, engine: int, restart: int, wait_s: float) -> tuple[int, Address]:
        """The engine's first restart from `restart` on that can be asked and has not died, waited for.

        Raises TimeoutError.
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
        """Tells all engines that nobody will ask them any more."""
        self._store.set("stop", "1")

    @property
    def stopping(self) -> bool:
        return self._get("stop") is not None

    def note_end(self) -> None:
        """Of one rank of an engine, after `stop`."""
        self._store.add("ended", 1)

    def wait_for_ends(self, num_ranks: int, wait_s: float) -> None:
        """Until so many ranks have ended, at most `wait_s`: they still read the store, which ends with rank 0."""
        deadline = time.monotonic() + wait_s
        while self._store.add("ended", 0) < num_ranks and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def _get(self, key: str) -> str | None:
        return self._store.get(key).decode() if self._store.check([key]) else None


def own_host(other: str) -> str:
    """The address of this machine on its way to `other`: what other ranks reach it by."""
    *_, target = socket.getaddrinfo(other, 1, socket.AF_INET, socket.SOCK_DGRAM)[0]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # nothing is sent
        probe.connect(target)
        return probe.getsockname()[0]
