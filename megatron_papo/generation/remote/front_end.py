"""The front end of a separate engine, on its first rank: where the trainer's ranks connect."""

from __future__ import annotations

import os
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue

from megatron_papo.config import Config
from megatron_papo.generation.remote.channel import Channel, Inbox
from megatron_papo.generation.remote.engine_store import Address, EngineRank, EngineStore, own_host
from megatron_papo.generation.remote.handshake import ConnectionListener
from megatron_papo.generation.remote.messages import Message
from megatron_papo.generation.remote.run_key import KEY_WAIT_S, read_key
from megatron_papo.generation.remote.weight_broadcast import WeightBroadcast


class FrontEnd:
    """Listens for the trainer's ranks and collects their messages; the store says where, once it listens."""

    def __init__(self, config: Config, engine_rank: EngineRank, store: EngineStore):
        self.broadcast: WeightBroadcast | None = None
        """The current group for weights; it is ended as soon as any rank of the trainer is gone."""
        self._inbox: Inbox = SimpleQueue()
        key = read_key(config.run.dir, store.key_fingerprint(), KEY_WAIT_S)
        listener = ConnectionListener(own_host(os.environ["MASTER_ADDR"]), key, self._open_channel)
        store.announce(engine_rank.engine, engine_rank.restart, Address(listener.host, listener.port))

    def messages(self, wait_s: float) -> list[tuple[Channel, Message | None]]:
        """All messages that have come in; waits for the first of them for `wait_s` seconds at most."""
        messages: list[tuple[Channel, Message | None]] = []
        try:
            messages.append(self._inbox.get(timeout=wait_s) if wait_s else self._inbox.get_nowait())
            while True:
                messages.append(self._inbox.get_nowait())
        except Empty:
            return messages

    def _open_channel(self, connection: Connection) -> None:
        Channel(connection, self._inbox, self._on_end)

    def _on_end(self) -> None:
        """Ends a broadcast that is under way: its weights will not come."""
        if self.broadcast is not None:
            self.broadcast.abort()
