"""A channel between a rank of the trainer and a separate engine: a connection, and a thread that reads it.

The thread reads every message as it comes, so that sending at one end never waits for the work of the other. The end of
a channel is delivered like a message.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from queue import SimpleQueue

from megatron_papo.generation.remote.handshake import close_connection
from megatron_papo.generation.remote.messages import Message, decode, encode

_MOST_BYTES = 2**33
"""The most bytes of a message. The largest hold the pictures of a rank's prompts, 3 bytes a pixel: here 2.8 thousand
million pixels."""

Inbox = SimpleQueue[tuple["Channel", Message | None]]
"""Messages of one or several channels, each with the channel it came by; None for the end of a channel."""


class Channel:
    """One end of a connection. Messages go to `inbox` as (this channel, message), its end as (this channel, None)."""

    def __init__(self, connection: Connection, inbox: Inbox, on_end: Callable[[], None] | None = None):
        """`on_end` is called by the reading thread, once, before the end goes to the inbox."""
        self._connection, self._inbox, self._on_end = connection, inbox, on_end
        self._thread = threading.Thread(target=self._read, name="channel", daemon=True)
        self._thread.start()

    def send(self, message: Message) -> None:
        """Sends a message. Where the other end is gone nothing is raised: the inbox says so.

        Raises ValueError for a message that is too large.
        """
        data = encode(message)
        if len(data) > _MOST_BYTES:
            raise ValueError(f"{len(data):,} bytes of prompts for one engine at once; a message takes {_MOST_BYTES:,}")
        with suppress(OSError):
            self._connection.send_bytes(data)

    def close(self) -> None:
        """Closes the connection: both ends learn of it at once, and the reading thread ends."""
        with suppress(OSError), socket.socket(fileno=os.dup(self._connection.fileno())) as end:
            close_connection(end)

    def _read(self) -> None:
        try:
            while True:
                self._inbox.put((self, decode(self._connection.recv_bytes(_MOST_BYTES))))
        except (OSError, EOFError):
            pass
        except ValueError as error:
            print(f"papo: warning: what came over a line ends it: {error}", file=sys.stderr, flush=True)
        finally:
            self._connection.close()
            if self._on_end is not None:
                self._on_end()
            self._inbox.put((self, None))
