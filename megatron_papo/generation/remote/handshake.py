"""How a rank of the trainer connects to an engine: both ends prove that they know the run's key.

The challenge is that of the standard library's connections (HMAC over random bytes, both ways, nothing unpickled). Each
peer that connects has a thread and a time limit of its own, so that silent strangers delay nobody. What is sent
afterwards is neither encrypted nor signed: closing the network is the cluster's part.
"""

from __future__ import annotations

import hmac
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge

_LIMIT_S = 10.0
"""Seconds for a peer to prove that it knows the key."""
_MOST_PENDING = 64
"""Peers that may be proving it at a time; with one more, the oldest is disconnected: a rank takes milliseconds."""


class ConnectionListener:
    """Listens on a free port of `host` from its construction on; one thread accepts, one more serves each peer."""

    def __init__(self, host: str, key: bytes, on_connection: Callable[[Connection], None]):
        """`on_connection` is called with every connection whose other end knows the key, by a thread of its own."""
        self._listening = socket.create_server((host, 0), backlog=128)
        self.host, self.port = host, self._listening.getsockname()[1]
        self._key, self._on_connection = _key_at(key, self.host, self.port), on_connection
        self._pending: list[socket.socket] = []
        self._lock = threading.Lock()
        self._has_warned = False
        threading.Thread(target=self._listen, name="listener", daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                end, (address, *_) = self._listening.accept()
                with self._lock:
                    self._pending.append(end)
                    if len(self._pending) > _MOST_PENDING:
                        close_connection(self._pending.pop(0))
                threading.Thread(target=self._authenticate, args=(end, address), name="peer", daemon=True).start()
            except (OSError, RuntimeError):  # gone again, or the system gives no more files or threads for now
                time.sleep(0.1)

    def _authenticate(self, end: socket.socket, address: str) -> None:
        try:
            connection = _proved(end, self._key, (deliver_challenge, answer_challenge))
            with self._lock:
                self._pending.remove(end)  # ValueError: it has been disconnected meanwhile
        except Exception:  # whatever a stranger sends
            self._warn(address)
        else:
            self._on_connection(connection)
        finally:
            with self._lock, suppress(ValueError):
                self._pending.remove(end)
            end.close()

    def _warn(self, address: str) -> None:
        """Warns of the first refused connection alone, so that strangers fill no log."""
        if not self._has_warned:
            self._has_warned = True
            print(
                f"papo: warning: a connection from {address} to this engine's port {self.port} was refused: it did not "
                "know the key; others are refused without a word", file=sys.stderr, flush=True,
            )  # fmt: skip


def connect(host: str, port: int, key: bytes) -> Connection:
    """A connection to the listener at `host`:`port`. Raises OSError, EOFError or AuthenticationError."""
    with socket.create_connection((host, port), timeout=_LIMIT_S) as end:
        end.settimeout(None)
        return _proved(end, _key_at(key, host, port), (answer_challenge, deliver_challenge))


def _proved(end: socket.socket, key: bytes, steps: tuple[Callable[[Connection, bytes], None], ...]) -> Connection:
    """A new connection over `end`, once both ends have proved in time that they know the key."""
    connection = Connection(os.dup(end.fileno()))
    try:
        with _limited(end):
            for step in steps:
                step(connection, key)
    except BaseException:
        connection.close()
        raise
    return connection


def close_connection(end: socket.socket) -> None:
    """Shuts the connection down: readers and writers at both ends stop at once, which closing would not achieve."""
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)


@contextmanager
def _limited(end: socket.socket) -> Iterator[None]:
    timer = threading.Timer(_LIMIT_S, close_connection, [end])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _key_at(key: bytes, host: str, port: int) -> bytes:
    """The key for one address: whoever puts another address in the store cannot relay an engine's challenge."""
    return hmac.digest(key, f"{host}:{port}".encode(), "sha256")
