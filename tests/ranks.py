"""Runs a function on N gloo ranks of this machine and hands back what each rank returned.

Ranks are forked from a server process that has imported torch and Megatron-Core once, so a test pays milliseconds
for a rank, not the import. The function must live at the top level of a test module; its arguments and its result
are pickled. A rank that raises ends the others and its traceback is the test's failure.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_PRELOAD = ["torch", "megatron_papo.accelerator", "tests.preload"]


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 300.0) -> list[Any]:
    """Calls `function(*args)` on ranks 0..world_size-1; the results, by rank."""
    from torch.multiprocessing import start_processes

    multiprocessing.set_forkserver_preload(_PRELOAD)
    with tempfile.TemporaryDirectory() as folder, socket.socket() as port_holder:
        port_holder.bind(("127.0.0.1", 0))
        port = port_holder.getsockname()[1]
        port_holder.close()
        context = start_processes(
            _rank_main,
            args=(world_size, port, folder, function, args),
            nprocs=world_size,
            join=False,
            start_method="forkserver",
        )
        deadline = time.monotonic() + timeout_s
        while not context.join(timeout=1.0):
            if time.monotonic() > deadline:
                for process in context.processes:
                    process.kill()
                raise TimeoutError(f"{function.__name__} on {world_size} ranks took longer than {timeout_s:.0f} s")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _rank_main(rank: int, world_size: int, port: int, folder: str, function: Callable[..., Any], args: tuple) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    torch.set_num_threads(1)
    result = function(*args)
    torch.save(result, Path(folder) / f"{rank}.pt")
