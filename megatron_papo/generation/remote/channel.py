"""The line between a rank of the trainer and a separate engine: a connection, and a thread that listens.

The thread reads every message as it comes, so that neither end's sending waits for the other's work. The end of a line
is a message too.
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
"""Of a message. The largest hold the pictures of a rank's prompts, 3 bytes a pixel: here 2.8 thousand million."""

Inbox = SimpleQueue[tuple["Channel", Message | None]]


class Channel:
    """One end of a connection. Messages go to `inbox` as (this line, message), its end as (this line, None)."""

    def __init__(self, connection: Connection, inbox: Inbox, on_end: Callable[[], None] | None = None):
        """`on_end` is called by the listening thread, once, before the end goes to the inbox."""
        self._connection, self._inbox, self._on_end = connection, inbox, on_end
        self._thread = threading.Thread(target=self._listen, name="line", daemon=True)
        self._thread.start()

    def send(self, message: Message) -> None:
        """Says nothing of an end that is gone: the inbox does. Raises ValueError for more than a line takes."""
        data = encode(message)
        if len(data) > _MOST_BYTES:
            raise ValueError(f"{len(data):,} bytes of prompts for one engine at once; a message takes {_MOST_BYTES:,}")
        with suppress(OSError):
            self._connection.send_bytes(data)

    def close(self) -> None:
        """Hangs up: the other end hears of it at once, and the listening thread ends."""
        with suppress(OSError), socket.socket(fileno=os.dup(self._connection.fileno())) as end:
            close_connection(end)

    def _listen(self) -> None:
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
