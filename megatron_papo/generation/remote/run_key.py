"""The key of a run's separate engines: a connection whose other end does not know it is refused.

Rank 0 of the trainer writes it to RUN/engines.key, which its user alone can read, on the disk that all ranks share
anyway. The store, which strangers on the network of a job of several machines may read, holds only its fingerprint:
by it, ranks tell whether the file belongs to this start.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch.distributed as dist

from megatron_papo.generation.remote.engine_store import EngineStore

_NAME = "engines.key"
_NUM_BYTES = 32
KEY_WAIT_S = 120.0
"""Seconds from the fingerprint in the store to the file on a network disk, whose clients remember for a minute that a
file was not there."""
_POLL_S = 0.1
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


@contextmanager
def offered_key(folder: Path, store: dist.Store) -> Iterator[None]:
    """Makes a key for the engines and the ranks that call them, and removes it at the end. By rank 0 of the trainer."""
    EngineStore(store).publish_key(fingerprint(make_key(folder)))
    try:
        yield
    finally:
        with suppress(OSError):
            (folder / _NAME).unlink()


def make_key(folder: Path) -> bytes:
    """A new key, written to its file whole or not at all; whatever has its name already is replaced.

    Raises ValueError where the disk lets others read the file, OSError where there can be none.
    """
    key = secrets.token_bytes(_NUM_BYTES)
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f"{_NAME}.tmp"
    draft.unlink(missing_ok=True)
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(handle, "wb") as file:
        if os.fstat(handle).st_mode & _OTHERS:
            draft.unlink()
            raise ValueError(f"{folder}: its disk keeps no file from other users, and the engines' key has to be")
        file.write(key)
        os.fsync(handle)
    draft.rename(folder / _NAME)
    return key


def fingerprint(key: bytes) -> str:
    """A hash of the key that everyone may know."""
    return hashlib.sha256(b"megatron_papo engines.key" + key).hexdigest()


def read_key(folder: Path, wanted: str, wait_s: float) -> bytes:
    """The key with the fingerprint `wanted`, for which it waits: a network disk may show a new file late.

    Raises ValueError when it does not come within `wait_s` seconds.
    """
    deadline = time.monotonic() + wait_s
    while True:
        try:
            key = _read_private(folder / _NAME)
            if hmac.compare_digest(fingerprint(key), wanted):
                return key
            fault = "is not this start's"
        except FileNotFoundError:
            fault = "does not appear here: run.dir has to be on a disk that all ranks share"
        except OSError as error:
            fault = error.strerror or str(error)
        if time.monotonic() >= deadline:
            raise ValueError(f"{folder / _NAME}: {fault}")
        time.sleep(_POLL_S)


def _read_private(path: Path) -> bytes:
    """The content of a file. Raises OSError for what is not a file of this user alone."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe does not block us
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(handle)
        # root of a container may be another user on the disk
        if not stat.S_ISREG(status.st_mode) or os.geteuid() not in (0, status.st_uid) or status.st_mode & _OTHERS:
            raise OSError(0, "is not a file of this user alone (chmod 600)")
        return file.read(_NUM_BYTES + 1)
