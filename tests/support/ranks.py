"""Runs a function on N gloo ranks of this machine and hands back what each rank returned.

Ranks are forked from a server that has imported what they need (`tests/support/process_server.py`), so a test pays
milliseconds for a rank, not the import. The function must live at the top level of a test module; its arguments and its
result are pickled. A rank that raises ends the others and its traceback is the test's failure.
"""

from __future__ import annotations

import itertools
import os
import pickle
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from megatron_papo.config import Config
from tests.support.process_wire import Request
from tests.support.processes import start

_ports = itertools.count(os.getpid())


class RankFailed(Exception):
    """A rank failed; the message has the rank's own traceback."""


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, vllm: bool | None = None, timeout_s: float = 300.0
) -> list[Any]:
    """Calls `function(*args)` on ranks 0..world_size-1; the results, by rank.

    `vllm`: the function imports vLLM; by default, whether a Config among `args` asks for it.
    """
    if vllm is None:
        vllm = any(isinstance(each, Config) and each.generation.engine == "vllm" for each in args)
    with tempfile.TemporaryDirectory() as folder:
        addresses = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        ranks = []
        for rank in range(world_size):
            places = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
            places["LOCAL_WORLD_SIZE"] = str(world_size)
            call = pickle.dumps((_rank_main, (Path(folder), rank, function, args)))
            environ = dict(os.environ) | addresses | places
            ranks.append(start(Request(environ, os.getcwd(), function.__module__, call), vllm=vllm))
        try:
            _wait(ranks, Path(folder), f"{function.__name__} on {world_size} ranks", time.monotonic() + timeout_s)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _free_port() -> int:
    """A port that only this worker of pytest uses, below those that the kernel gives to connections. A port that the
    kernel gave and that was closed again could be taken by the ranks of another worker."""
    first = 5_000 + 1_000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    for _ in range(1_000):
        port = first + next(_ports) % 1_000
        with socket.socket() as holder, suppress(OSError):
            holder.bind(("127.0.0.1", port))
            return port
    raise RuntimeError(f"no free port from {first} on")


def _wait(ranks: Sequence[Any], folder: Path, what: str, deadline: float) -> None:
    while not all(process.poll() == 0 for process in ranks):
        if any(process.poll() for process in ranks):
            time.sleep(0.1)  # others fail because of the first, and may be seen before it
            raise RankFailed(_reasons(ranks, folder))
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} took too long")
        _until_one_ends([process for process in ranks if process.poll() is None])


def _until_one_ends(ranks: Sequence[Any]) -> None:
    if ranks and hasattr(ranks[0], "fileno"):
        wait(ranks, timeout=1.0)
    else:
        time.sleep(0.02)


def _reasons(ranks: Sequence[Any], folder: Path) -> str:
    """Which ranks a signal ended, and what the first that raised has said."""
    codes = {rank: process.poll() for rank, process in enumerate(ranks)}
    ended = [
        f"rank {rank} was ended by {signal.Signals(-code).name}" for rank, code in codes.items() if (code or 0) < 0
    ]
    said = sorted(folder.glob("*.txt"), key=lambda file: file.stat().st_mtime_ns)
    return "\n".join(ended + [file.read_text() for file in said[:1]]) or f"exit codes of the ranks: {codes}"


def _rank_main(folder: Path, rank: int, function: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(1)
    try:
        result = function(*args)
    except Exception:
        (folder / f"{rank}.txt").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        raise
    torch.save(result, folder / f"{rank}.pt")
