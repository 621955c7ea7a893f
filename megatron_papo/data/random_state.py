"""Random numbers that depend on what they are for, and on nothing else."""

from __future__ import annotations

import hashlib

import numpy as np


def random_state(*parts: str | int) -> np.random.RandomState:
    """A generator seeded from values that name what it is for; the same on every machine and numpy release.

    RandomState, because numpy froze its streams; blake2b, because Python's own hash differs between processes.
    """
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=16).digest()
    return np.random.RandomState(np.frombuffer(digest, dtype="<u4").astype(np.uint32))
