"""Where the ranks of a start find each other: the store at MASTER_ADDR:MASTER_PORT, and who else can reach them.

torch's own store and gloo listen on whatever interface they find, also for ranks that are all on one machine. Where
MASTER_ADDR says that they are, the store of rank 0 is made here, and nothing listens beyond the machine's loopback.
Several machines talk as torch.distributed does: over a network that the cluster closes. Leaves out torchrun's store,
which torchrun makes (docs/security.md).
"""

from __future__ import annotations

import datetime
import os
import socket

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

LOOPBACK = "127.0.0.1"
_ONE_MACHINE = (LOOPBACK, "localhost")
"""As written, not resolved: a machine's own name may mean 127.0.1.1 on itself and something else on all others."""
_KEPT_LOCAL = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "VLLM_HOST_IP": LOOPBACK}
"""Network interfaces for gloo, NCCL and vLLM. A variable that is set already is kept."""

_store: dist.Store | None = None


def world_store(timeout_s: float) -> dist.Store:
    """Names and values that all ranks share, those of separate engines too: on rank 0 or with torchrun.

    The first call waits until all have come. A process that was started without RANK shares with nobody.
    Raises OSError when MASTER_PORT of one machine is taken.
    """
    global _store
    if _store is None:
        timeout, environ = datetime.timedelta(seconds=timeout_s), os.environ
        single, local = "RANK" not in environ, environ.get("MASTER_ADDR") in _ONE_MACHINE
        # torchrun names the machine, and says how many of the ranks are on it
        if single or local or environ.get("LOCAL_WORLD_SIZE") == environ["WORLD_SIZE"]:
            for name, value in _KEPT_LOCAL.items():
                environ.setdefault(name, value)
        if single:
            _store = dist.HashStore()
        elif local and environ["RANK"] == "0" and environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            _store = _listening(int(environ["MASTER_PORT"]), timeout)
        else:
            _store = next(rendezvous("env://", timeout=timeout))[0]
    return _store


def _listening(port: int, timeout: datetime.timedelta) -> dist.Store:
    try:
        listening = socket.create_server((LOOPBACK, port), backlog=2048)
    except OSError as error:
        raise OSError(error.errno, f"MASTER_PORT={port}: {error.strerror}") from error
    size = int(os.environ["WORLD_SIZE"])
    return dist.TCPStore(LOOPBACK, port, size, True, timeout, master_listen_fd=listening.detach())
