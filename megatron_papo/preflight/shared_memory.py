"""Whether /dev/shm has room, which ranks on the GPUs of one machine exchange values by: NCCL, and vLLM's processes.

A container has 64 MiB of it unless it is told otherwise, and NCCL ends in "No space left on device" long after the
start.
"""

from __future__ import annotations

import os
from pathlib import Path

_SHARED = Path("/dev/shm")
_WANTED_GIB = 1.0
"""NCCL takes some ten MiB for each pair of ranks, vLLM some hundred where it starts processes."""


def warnings_of_shared_memory(folder: Path = _SHARED) -> list[str]:
    """A line where less is free than ranks on several GPUs of this machine may take."""
    try:
        status = os.statvfs(folder)
    except OSError as error:
        return [f"{folder}: {error.strerror}: ranks on one machine exchange values by it"]
    free = status.f_bavail * status.f_frsize / 2**30
    if free >= _WANTED_GIB:
        return []
    return [
        f"{folder}: {free:.2f} GiB are free, NCCL and vLLM may need {_WANTED_GIB:g}: a container gets more by "
        "`docker run --ipc=host` or `--shm-size=16g`; NCCL_SHM_DISABLE=1 does without, slower"
    ]
