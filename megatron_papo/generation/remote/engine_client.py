"""The connection of one rank of the trainer to one restart of one separate engine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue

from megatron_papo.generation.remote.channel import Channel, Inbox
from megatron_papo.generation.remote.engine_store import EngineStore
from megatron_papo.generation.remote.handshake import connect
from megatron_papo.generation.remote.messages import Message
from megatron_papo.generation.remote.weight_broadcast import WeightBroadcast

REASON_S = 5.0
"""Seconds from the end of a channel until the engine's supervisor has noted the reason."""


class EngineClient:
    """Sends messages to the engine and receives its own."""

    def __init__(self, engine: int, restart: int, connection: Connection):
        self.engine, self.restart = engine, restart
        self.broadcast: WeightBroadcast | None = None
        """The current group for weights; it is ended as soon as the engine is gone."""
        self.lost = False
        """Whether the engine is gone, or this client has closed its channel."""
        self._inbox: Inbox = SimpleQueue()
        self._channel = Channel(connection, self._inbox, self._on_end)

    @classmethod
    def open(cls, store: EngineStore, engine: int, restart: int, key: bytes, wait_s: float) -> EngineClient:
        """Connects to the engine's first living restart from `restart` on. Raises TimeoutError after `wait_s`."""
        deadline = time.monotonic() + wait_s
        while True:
            restart, address = store.living(engine, restart, deadline - time.monotonic())
            try:
                connection = connect(address.host, address.port, key)
            except (OSError, EOFError, AuthenticationError):  # it has just died, and its supervisor is about to say so
                store.death(engine, restart, REASON_S)
                continue
            return cls(engine, restart, connection)

    def send(self, message: Message) -> None:
        """Sends a message; nothing is raised where the engine is gone."""
        self._channel.send(message)

    def messages(self) -> Iterator[Message]:
        """What the engine sends, as it comes, until the channel ends."""
        while not self.lost or not self._inbox.empty():
            try:
                _, message = self._inbox.get(timeout=1.0)
            except Empty:
                continue
            if message is None:
                return
            yield message

    def close(self) -> None:
        """Closes the channel; the engine counts as lost."""
        self.lost = True
        self._channel.close()

    def _on_end(self) -> None:
        """Called by the thread that reads the channel."""
        self.lost = True
        if self.broadcast is not None:
            self.broadcast.abort()  # nobody waits in it for a rank that is gone
