"""The process of one rank of a separate vLLM engine, from its start to its end.

It ends with the supervisor that started it (engine_supervisor.py), to which it sends the reason of a failure. Its work
in between is engine_server.py.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist

from megatron_papo.config import Config
from megatron_papo.config.derived import model_folder
from megatron_papo.data.processor import load_processor
from megatron_papo.distributed import accelerator
from megatron_papo.distributed.layout import Layout, tensor_layout
from megatron_papo.distributed.rendezvous import world_store
from megatron_papo.generation.remote.engine_server import EngineServer
from megatron_papo.generation.remote.engine_store import EngineRank, EngineStore
from megatron_papo.generation.remote.front_end import FrontEnd
from megatron_papo.generation.vllm.vllm_engine import VllmGenerator
from megatron_papo.runtime.process import begin, go_on_without_readers

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class EngineEnding:
    """Why an engine's process failed."""

    text: str
    is_users: bool
    """Whether it was a ValueError: something that a user can put right."""


def run_engine(config: Config, engine_rank: EngineRank, sender: Connection) -> None:
    """The whole process; `sender` takes an `EngineEnding` as JSON where it fails."""
    _end_with_parent()
    begin()
    go_on_without_readers()
    try:
        _serve(config, engine_rank)
    except Exception as error:
        traceback.print_exc()
        ending = EngineEnding(f"{type(error).__name__}: {error}", isinstance(error, ValueError))
        sender.send_bytes(json.dumps(asdict(ending)).encode())
        sys.stderr.flush()
        os._exit(1)  # without the clean-up of groups, which may wait for ranks that are gone


def _end_with_parent() -> None:
    """Ends this process when its parent ends.

    The kernel's signal comes even while the interpreter is blocked; the thread also notices a parent that ended while
    this process was still importing.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _serve(config: Config, engine_rank: EngineRank) -> None:
    store = world_store(config.parallel.timeout_s)
    layout = _join(config, engine_rank, store)
    generator = VllmGenerator(config, load_processor(model_folder(config), config.data), layout)
    front_end = FrontEnd(config, engine_rank, EngineStore(store)) if engine_rank.rank == 0 else None
    EngineServer(config, generator, front_end, store, engine_rank).serve()
    generator.close()
    if dist.is_initialized():  # vLLM ends a world that it takes for its own
        dist.destroy_process_group()


def _join(config: Config, engine_rank: EngineRank, store: dist.Store) -> Layout:
    """Joins a world that consists of this engine's ranks."""
    if accelerator.has_gpu():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    own = dist.PrefixStore(f"engine_{engine_rank.engine}.{engine_rank.restart}", store)
    size = config.generation.tensor
    dist.init_process_group(accelerator.backend(), store=own, rank=engine_rank.rank, world_size=size)
    return tensor_layout(engine_rank.rank, size)
