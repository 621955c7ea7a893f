"""What the servers of `tests/support/process_server.py` are asked, and how it travels: trees and open files over a
socket.

Imports little, for `tests/support/interpreter.py` waits for it.
"""

from __future__ import annotations

import pickle
import socket
import struct
from typing import Any, NamedTuple

FOLDER = "PAPO_TEST_PROCESSES"
"""The variable by which pytest's workers, and what they start, know the folder of the servers."""
_MOST_DESCRIPTORS = 250
"""Linux lets 253 travel at once."""


class Request(NamedTuple):
    """What one process is asked to do."""

    environ: dict[str, str]
    cwd: str
    module: str = ""
    """The module of what the process does; the server imports it before it forks."""
    call: bytes = b""
    """A pickled function with its arguments; else `argv` is run as Python runs it."""
    argv: tuple[str, ...] = ()
    """`-m MODULE WORDS...`, `-c CODE WORDS...` or `SCRIPT WORDS...`."""
    new_session: bool = False
    descriptors: tuple[int, ...] = (0, 1, 2)
    """What the open files that come with the request are in the process; any more are namespaces that it enters."""
    tied: bool = False
    """It ends with the connection, and is sent the signals whose numbers come over it."""


def send(connection: socket.socket, tree: Any, descriptors: tuple[int, ...] = ()) -> None:
    """A short tree arrives whole: who has seen its beginning need not wait for the rest."""
    data = pickle.dumps(tree)
    data = struct.pack("!I", len(data)) + data
    rest = data[socket.send_fds(connection, [data], list(descriptors)) :]
    if rest:  # sending nothing fails as well where the other side, which has all of it, is done and gone
        connection.sendall(rest)


def receive(connection: socket.socket) -> tuple[Any, list[int]]:
    """A tree and the descriptors that came with it; raises EOFError when the other side is gone."""
    head, descriptors, _, _ = socket.recv_fds(connection, 4, _MOST_DESCRIPTORS)
    if len(head) < 4:
        raise EOFError("the other side of the process server is gone")
    (left,) = struct.unpack("!I", head)
    chunks = []
    while left:
        chunk = connection.recv(min(left, 1 << 20))
        if not chunk:
            raise EOFError("the other side of the process server is gone")
        chunks.append(chunk)
        left -= len(chunk)
    return pickle.loads(b"".join(chunks)), descriptors
