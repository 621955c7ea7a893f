"""A separate vLLM engine: one process a rank, which answers the trainer's ranks until it is told to stop.

The first rank listens; what comes in it shares with the engine's other ranks, so that all of them run the same
scheduler over the same requests (vLLM's external launcher). Requests of several ranks of the trainer join and leave
one batch. An error ends the process: `serve.py` starts the next.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue

import torch
import torch.distributed as dist

from megatron_papo.config import Config
from megatron_papo.data.processor import load_processor
from megatron_papo.distributed import accelerator
from megatron_papo.distributed.layout import Layout
from megatron_papo.distributed.rendezvous import world_store
from megatron_papo.generation.remote.channel import Channel, Inbox
from megatron_papo.generation.remote.engine_store import Address, EngineStore, own_host
from megatron_papo.generation.remote.handshake import ConnectionListener
from megatron_papo.generation.remote.messages import (
    Answers,
    BucketMessage,
    Bye,
    Generate,
    GenerationProgress,
    Load,
    Loaded,
    Message,
    Stop,
)
from megatron_papo.generation.remote.run_key import KEY_WAIT_S, read_key
from megatron_papo.generation.remote.weight_broadcast import WeightBroadcast
from megatron_papo.generation.requests import Answer, RolloutRequest
from megatron_papo.generation.vllm.vllm_engine import VllmGenerator
from megatron_papo.runtime.process import begin, go_on_without_readers

_PR_SET_PDEATHSIG = 1
_PROGRESS_S = 0.5
_POLL_STEPS = 8
"""Ranks of one engine look together for new messages after so many tokens: it costs them an exchange."""
_IDLE_S = 10.0
"""They do so this often while there is nothing to do, so that no exchange runs into its time limit."""


@dataclass(frozen=True)
class EngineRank:
    """Which process of which engine this is."""

    engine: int
    rank: int
    """Of the engine's `generation.tensor`."""
    restart: int


@dataclass(frozen=True)
class EngineEnding:
    """An engine's last words."""

    text: str
    is_users: bool
    """A ValueError: what a user can put right."""


def run_engine(config: Config, engine_rank: EngineRank, says: Connection) -> None:
    """The whole process."""
    _end_with_parent()
    begin()
    go_on_without_readers()
    try:
        _serve(config, engine_rank)
    except Exception as error:
        traceback.print_exc()
        ending = EngineEnding(f"{type(error).__name__}: {error}", isinstance(error, ValueError))
        says.send_bytes(json.dumps(asdict(ending)).encode())
        sys.stderr.flush()
        os._exit(1)  # without the clean-up of groups, which may wait for ranks that are gone


def _end_with_parent() -> None:
    """The kernel's signal comes also while the interpreter is blocked; the thread knows, too, of a parent that ended
    while this process still imported."""
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
    folder = config.model.path or config.model.checkpoint
    assert folder is not None
    generator = VllmGenerator(config, load_processor(folder, config.data), layout)
    desk = _FrontEnd(config, engine_rank, EngineStore(store)) if engine_rank.rank == 0 else None
    _Server(config, generator, desk, store, engine_rank).serve()
    generator.close()
    if dist.is_initialized():  # vLLM ends a world that it takes for its own
        dist.destroy_process_group()


def _join(config: Config, engine_rank: EngineRank, store: dist.Store) -> Layout:
    """A world of this engine's ranks alone."""
    if accelerator.has_gpu():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    own = dist.PrefixStore(f"engine_{engine_rank.engine}.{engine_rank.restart}", store)
    size = config.generation.tensor
    dist.init_process_group(accelerator.backend(), store=own, rank=engine_rank.rank, world_size=size)
    world = dist.group.WORLD
    assert world is not None
    alone = [dist.new_group([rank]) for rank in range(size)][engine_rank.rank]
    return Layout(
        rank=engine_rank.rank, world_size=size, tensor_rank=engine_rank.rank, tensor_size=size, pipeline_rank=0,
        pipeline_size=1, data_rank=0, data_size=1, tensor_group=world, pipeline_group=alone, data_group=alone,
        model_group=world,
    )  # fmt: skip


class _FrontEnd:
    """Where the trainer's ranks come in, on the engine's first rank."""

    def __init__(self, config: Config, engine_rank: EngineRank, store: EngineStore):
        self.inbox: Inbox = SimpleQueue()
        self.broadcast: WeightBroadcast | None = None
        key = read_key(config.run.dir, store.key_fingerprint(), KEY_WAIT_S)
        door = ConnectionListener(own_host(os.environ["MASTER_ADDR"]), key, self._let_in)
        store.announce(engine_rank.engine, engine_rank.restart, Address(door.host, door.port))

    def _let_in(self, connection: Connection) -> None:
        Channel(connection, self.inbox, self._hung_up)

    def _hung_up(self) -> None:
        """Weights that are on their way will not come."""
        if self.broadcast is not None:
            self.broadcast.abort()


@dataclass
class _Call:
    """What one rank of the trainer has asked for."""

    line: Channel | None
    """On the first rank."""
    asked: Generate
    started: float = field(default_factory=time.monotonic)
    told: float = 0.0
    answers: list[Answer] = field(default_factory=list)
    num_cached: int = 0
    num_read: int = 0


class _Server:
    """The loop: messages in, a token for every running request, answers out."""

    def __init__(
        self,
        config: Config,
        generator: VllmGenerator,
        desk: _FrontEnd | None,
        store: dist.Store,
        engine_rank: EngineRank,
    ):
        self._config, self._generator, self._desk, self._store, self._seat = config, generator, desk, store, engine_rank
        self._running: dict[str, tuple[_Call, RolloutRequest]] = {}
        """By vLLM's number of the request."""
        self._pending: deque[tuple[Channel | None, Message | None]] = deque()
        self._bridge: WeightBroadcast | None = None
        self._left: set[Channel | None] = set()
        self._num_steps = 0

    def serve(self) -> None:
        while True:
            if not self._running or self._seat_is_alone or self._num_steps % _POLL_STEPS == 0:
                self._fetch(wait=not self._running)
            while self._pending:
                line, message = self._pending.popleft()
                if isinstance(message, Stop):
                    return
                self._handle(line, message)
            if self._running:
                self._step()

    @property
    def _seat_is_alone(self) -> bool:
        return self._generator.engine_group is None

    def _fetch(self, wait: bool) -> None:
        """What has come in, on all ranks of the engine alike; with `wait` there is something, or a while has passed."""
        found: list[tuple[Channel, Message | None]] = []
        if self._desk is not None:
            found = _drain(self._desk.inbox, _IDLE_S if wait else 0.0)
        if self._seat_is_alone:
            self._pending.extend(found)
            return
        box = [[message for _, message in found]]
        dist.broadcast_object_list(box, group=self._generator.engine_group, group_src=0)
        lines: list[Channel | None] = [line for line, _ in found] or [None] * len(box[0])
        self._pending.extend(zip(lines, box[0]))

    def _handle(self, line: Channel | None, message: Message | None) -> None:
        if isinstance(message, Generate):
            self._begin(_Call(line, message))
        elif isinstance(message, Load):
            self._load(line, message)
        elif isinstance(message, Bye):
            self._left.add(line)
        else:
            assert message is None, message
            if line not in self._left and line is not None:
                # it takes this engine for lost and waits for the next
                raise RuntimeError("a rank of the trainer hung up")

    def _begin(self, call: _Call) -> None:
        asked, requests = call.asked, self._generator.requests
        prompts = [asked.requests[job.prompt_index].prompt() for job in asked.jobs]
        params = [requests.params(job, asked.sampling) for job in asked.jobs]
        numbers = self._generator.llm.enqueue(prompts, params, use_tqdm=False)
        for number, job in zip(numbers, asked.jobs, strict=True):
            self._running[number.partition("-")[0]] = call, job  # vLLM adds letters of its own to its count

    def _step(self) -> None:
        self._num_steps += 1
        for output in self._generator.llm.llm_engine.step():
            if not output.finished:
                continue
            call, job = self._running.pop(output.request_id)
            request = call.asked.requests[job.prompt_index]
            call.answers.append(self._generator.requests.answer(job, request, output))  # type: ignore[arg-type]
            call.num_read += len(output.prompt_token_ids or ())
            call.num_cached += output.num_cached_tokens or 0  # type: ignore[union-attr]
            self._report(call)

    def _report(self, call: _Call) -> None:
        if call.line is None:
            return
        done, total, now = len(call.answers), len(call.asked.jobs), time.monotonic()
        if done == total:
            version = self._generator.policy_version
            assert version is not None
            cached = (float(call.num_cached), float(call.num_read))
            call.line.send(Answers(call.asked.call, tuple(call.answers), version, now - call.started, cached))
        elif now - call.told > _PROGRESS_S:
            call.told = now
            call.line.send(GenerationProgress(call.asked.call, done, total))

    def _load(self, line: Channel | None, load: Load) -> None:
        """New weights; a fault of theirs is the trainer's to hear, any other ends this engine."""
        assert not self._running, "weights come when all rollouts have been answered"
        fault = None
        if self._bridge is None or self._bridge.name != load.broadcast:
            self._bridge = self._open(load.broadcast)
        try:
            self._generator.load_weights(self._arriving(self._bridge), load.policy_version)
        except ValueError as error:
            fault = str(error)
        if line is not None:
            line.send(Loaded(fault))

    def _open(self, name: str) -> WeightBroadcast:
        generation, engine_rank = self._config.generation, self._seat
        rank = 1 + engine_rank.engine * generation.tensor + engine_rank.rank
        size = 1 + generation.num_engine_ranks
        broadcast = WeightBroadcast(name, self._store, rank, size)
        if self._desk is not None:
            self._desk.broadcast = broadcast
        return broadcast

    def _arriving(self, broadcast: WeightBroadcast) -> Iterator[tuple[str, torch.Tensor]]:
        while True:
            while not self._pending:
                self._fetch(wait=True)
            _, message = self._pending.popleft()
            if isinstance(message, Loaded):
                return
            if message is None:
                raise RuntimeError("the trainer hung up while it handed its weights over")
            assert isinstance(message, BucketMessage), message
            yield from broadcast.receive(message)


def _drain(inbox: Inbox, wait_s: float) -> list[tuple[Channel, Message | None]]:
    """All that is there; with `wait_s` at least one, or nothing after so long."""
    found: list[tuple[Channel, Message | None]] = []
    try:
        found.append(inbox.get(timeout=wait_s) if wait_s else inbox.get_nowait())
        while True:
            found.append(inbox.get_nowait())
    except Empty:
        return found
