"""How a rank of the trainer gets a line to an engine: both prove that they know the key, then they may talk.

The challenge is that of the standard library's connections (HMAC over random bytes, both ways, nothing unpickled). Each
comer has a thread and a time limit of its own, so that silent strangers hold nobody up. What is said afterwards
is neither encrypted nor signed: the network is the cluster's to close.
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
"""To prove that one knows the key."""
_MOST_COMERS = 64
"""At a time; one more, and the one that has been at it for longest has to go: a rank takes milliseconds."""


class ConnectionListener:
    """Listens on a port of `host` from the beginning; a thread each listens and lets in."""

    def __init__(self, host: str, key: bytes, let_in: Callable[[Connection], None]):
        """`let_in` is called with every connection whose other end knows the key, by a thread of its own."""
        self._listening = socket.create_server((host, 0), backlog=128)
        self.host, self.port = host, self._listening.getsockname()[1]
        self._key, self._let_in = _key_at(key, self.host, self.port), let_in
        self._comers: list[socket.socket] = []
        self._lock = threading.Lock()
        self._has_warned = False
        threading.Thread(target=self._listen, name="door", daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                end, (address, *_) = self._listening.accept()
                with self._lock:
                    self._comers.append(end)
                    if len(self._comers) > _MOST_COMERS:
                        close_connection(self._comers.pop(0))
                threading.Thread(target=self._ask, args=(end, address), name="comer", daemon=True).start()
            except (OSError, RuntimeError):  # gone again, or the system gives no more files or threads for now
                time.sleep(0.1)

    def _ask(self, end: socket.socket, address: str) -> None:
        try:
            connection = _proved(end, self._key, (deliver_challenge, answer_challenge))
            with self._lock:
                self._comers.remove(end)  # ValueError: it has been sent away meanwhile
        except Exception:  # whatever a stranger sends
            self._warn(address)
        else:
            self._let_in(connection)
        finally:
            with self._lock, suppress(ValueError):
                self._comers.remove(end)
            end.close()

    def _warn(self, address: str) -> None:
        """Once: strangers fill no log."""
        if not self._has_warned:
            self._has_warned = True
            print(
                f"papo: warning: a connection from {address} to this engine's port {self.port} was refused: it did not "
                "know the key; others are refused without a word", file=sys.stderr, flush=True,
            )  # fmt: skip


def connect(host: str, port: int, key: bytes) -> Connection:
    """A connection to the door at `host`:`port`. Raises OSError, EOFError or AuthenticationError."""
    with socket.create_connection((host, port), timeout=_LIMIT_S) as end:
        end.settimeout(None)
        return _proved(end, _key_at(key, host, port), (answer_challenge, deliver_challenge))


def _proved(end: socket.socket, key: bytes, steps: tuple[Callable[[Connection, bytes], None], ...]) -> Connection:
    """A connection of its own over `end`, once both have proved that they know the key, in time."""
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
    """Whoever reads or writes at either end stops at once, which closing alone would not bring about."""
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
    """Of one address alone: whoever puts his own in the store cannot pass an engine's challenge on to a rank."""
    return hmac.digest(key, f"{host}:{port}".encode(), "sha256")
