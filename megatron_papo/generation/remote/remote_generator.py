"""Generation with vLLM on ranks of its own: the trainer's side. `serve.py` and `serve_engine.py` are the other.

The leader of each model-parallel group asks one engine (data rank d the engine d mod E) for the rollouts of its
group and shares the answers; rank 0 sends weights to all engines at once. Between `submit` and `collect` the trainer
may do as it likes. Where an engine dies, every rank of the trainer hears of it at the same point, by EngineLost.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

from megatron_papo.config import Config
from megatron_papo.distributed import accelerator
from megatron_papo.distributed.exchange import gather_objects
from megatron_papo.distributed.layout import Layout, world_group
from megatron_papo.distributed.rendezvous import world_store
from megatron_papo.generation.generator import EngineLost, Report, Sampling
from megatron_papo.generation.remote.channel import Channel, Inbox
from megatron_papo.generation.remote.engine_store import EngineStore
from megatron_papo.generation.remote.handshake import connect
from megatron_papo.generation.remote.messages import (
    Answers,
    Bye,
    Generate,
    GenerationProgress,
    Load,
    Loaded,
    Message,
    Stop,
)
from megatron_papo.generation.remote.run_key import KEY_WAIT_S, read_key
from megatron_papo.generation.remote.weight_broadcast import BroadcastBroken, WeightBroadcast
from megatron_papo.generation.requests import groups_of, make_requests
from megatron_papo.generation.vllm.start import check_settings
from megatron_papo.generation.vllm.vllm_requests import Requests
from megatron_papo.types import Group, Metrics, Prompt

if TYPE_CHECKING:
    from megatron_papo.data.processor import Processor

_REASON_S = 5.0
"""From the end of a line to what the engine's own rank says of it."""
_END_S = 20.0


class RemoteGenerator:
    """See `Generator`. One call may be under way: `generate` is `submit` and `collect`."""

    def __init__(self, config: Config, processor: Processor, layout: Layout, report: Report | None = None):
        check_settings(config)
        self.policy_version: int | None = None
        self.forgotten_version: int | None = None  # engines on GPUs of their own do not sleep
        self.requests = Requests.of(config, processor)
        self._config, self._layout, self._report = config, layout, report
        self._world_store = world_store(config.parallel.timeout_s)
        self._store = EngineStore(self._world_store)
        engines, leads = config.generation.engines, layout.tensor_rank == layout.pipeline_rank == 0
        self._own = layout.data_rank % engines if leads else None
        """The engine this rank asks."""
        self._talks_to = list(range(engines)) if layout.rank == 0 else [] if self._own is None else [self._own]
        if self._talks_to:
            self._key = read_key(config.run.dir, self._store.key_fingerprint(), KEY_WAIT_S)
        self._links: dict[int, _Link] = {}
        self._incarnations = dict.fromkeys(self._talks_to, 0)
        self._bridge: WeightBroadcast | None = None
        self._calls = itertools.count()
        self._asked: _Asked | None = None
        self._metrics: Metrics = {}

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        self.submit(prompts, sampling)
        return self.collect()

    def submit(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        """Asks for rollouts and does not wait. The ranks of a model-parallel group call together."""
        if self.policy_version is None:
            raise RuntimeError("generate before the first load_weights: the generator has no weights")
        assert self._asked is None, "collect comes first"
        self.requests.check(prompts, sampling)
        self._asked = _Asked(next(self._calls), tuple(prompts), sampling)
        if self._own is not None and prompts:
            jobs = tuple(make_requests(prompts, sampling))
            requests = {place: self.requests.request(prompt, sampling) for place, prompt in enumerate(prompts)}
            self._links[self._own].line.send(Generate(self._asked.call, jobs, requests, sampling))

    def collect(self) -> list[Group]:
        """The rollouts of the last `submit`, waited for. All ranks of the trainer call together.

        Raises EngineLost, on all of them, when any engine has died; what it was asked for is forgotten.
        """
        asked, self._asked = self._asked, None
        assert asked is not None, "submit comes first"
        answers = self._hear(asked)
        self._raise_where_lost("while it made rollouts")
        assert answers is not None
        self._metrics = {"engine/seconds": (answers.seconds, 1.0), "engine/prefix_cached": answers.prefix_cached}
        decode = self.requests.processor.decode
        return groups_of(asked.prompts, asked.sampling, answers.answers, decode, answers.policy_version)

    def _hear(self, asked: _Asked) -> Answers | None:
        """The answers on every rank of the model-parallel group; None when the engine is gone.

        Progress goes to all of them as well, or their watchdogs would take the wait for a stall.
        """
        messages = self._said(asked) if self._own is not None else itertools.repeat(None)
        for message in messages:
            box = [message]
            if self._layout.model_group.size() > 1:
                dist.broadcast_object_list(box, group=self._layout.model_group, group_src=0)
            if not isinstance(box[0], GenerationProgress):
                return box[0]
            if self._report is not None:
                self._report(box[0].done, box[0].total)
        raise AssertionError("the last message is no progress")

    def _said(self, asked: _Asked) -> Iterator[GenerationProgress | Answers | None]:
        """What the engine says of the call, to the leader: its last is the answers, or None."""
        assert self._own is not None and self.policy_version is not None
        if not asked.prompts:
            yield Answers(asked.call, (), self.policy_version, 0.0, (0.0, 0.0))
            return
        for message in self._links[self._own].messages():
            if isinstance(message, GenerationProgress | Answers) and message.call == asked.call:
                yield message
                if isinstance(message, Answers):
                    return
        yield None

    def load_weights(self, named_tensors: Iterator[tuple[str, Tensor]], policy_version: int) -> None:
        """See `Generator`. Raises EngineLost, on all ranks alike, when an engine died of it or before."""
        assert self._asked is None, "weights are handed over when all rollouts have been collected"
        self.policy_version = None
        self._connect()
        self._raise_where_lost("before the weights were handed over")
        fault = None
        if self._layout.rank == 0:
            fault = self._send(named_tensors, policy_version)
        else:
            for _ in named_tensors:  # drawing from it is a collective
                pass
        self._raise_where_lost("while the weights were handed over")
        faults = gather_objects(fault, world_group())
        if faults[0] is not None:
            raise ValueError(faults[0])
        self.policy_version = policy_version

    def _send(self, named_tensors: Iterator[tuple[str, Tensor]], policy_version: int) -> str | None:
        """To all engines, from rank 0; what they say is wrong with the weights."""
        links, generation = list(self._links.values()), self._config.generation
        dtype = accelerator.parameter_dtype(
            self._config.model.dtype if generation.dtype == "auto" else generation.dtype
        )
        name = "bridge_" + "_".join(str(self._incarnations[engine]) for engine in self._talks_to)

        def tell(message: Message) -> None:
            for link in links:
                link.line.send(message)

        tell(Load(policy_version, name))
        try:
            broadcast = self._open_bridge(name)
            broadcast.send(named_tensors, tell, dtype, generation.bucket_mib * 2**20)
        except BroadcastBroken:
            for _ in named_tensors:
                pass
            for link in links:  # those that live cannot use half the weights either: they start again
                link.hang_up()
            return None
        tell(Loaded())
        answers = [next((m for m in link.messages() if isinstance(m, Loaded)), None) for link in links]
        return next((answer.fault for answer in answers if answer is not None and answer.fault), None)

    def _open_bridge(self, name: str) -> WeightBroadcast:
        if self._bridge is None or self._bridge.name != name:
            size = 1 + self._config.generation.num_engine_ranks
            self._bridge = WeightBroadcast(name, self._world_store, 0, size)
            for link in self._links.values():
                link.broadcast = self._bridge
        return self._bridge

    def _connect(self) -> None:
        """Lines to all engines that this rank talks to, as soon as they can be asked."""
        for engine in self._talks_to:
            if engine not in self._links:
                wait_s = self._config.parallel.timeout_s
                link = _Link.open(self._store, engine, self._incarnations[engine], self._key, wait_s)
                self._links[engine], self._incarnations[engine] = link, link.restart

    def _raise_where_lost(self, when: str) -> None:
        """On every rank of the trainer when any of them has lost an engine; lines to it are closed on all."""
        own = [(link.engine, link.restart, self._reason(link)) for link in self._links.values() if link.lost]
        lost = [each for share in gather_objects(own, world_group()) for each in share]
        for engine, restart, _ in lost:
            if engine in self._links and self._links[engine].restart <= restart:
                self._links.pop(engine).hang_up()
                self._incarnations[engine] = restart + 1
        if lost:
            self.policy_version = None
            reasons = {engine: f"engine {engine} died ({reason})" for engine, _, reason in reversed(lost)}
            raise EngineLost(f"{', '.join(reasons[engine] for engine in sorted(reasons))} {when}")

    def _reason(self, link: _Link) -> str:
        return self._store.death(link.engine, link.restart, _REASON_S) or "its line broke"

    def restart(self) -> None:
        """Waits for the next restart of whatever was lost."""
        self._connect()

    def take_metrics(self) -> Metrics:
        metrics, self._metrics = self._metrics, {}
        return metrics

    def close(self) -> None:
        """Tells the engines to end; waits for that unless rollouts are under way, which nobody will collect."""
        if self._layout.rank == 0:
            self._store.stop()
            for link in self._links.values():
                link.line.send(Stop())
            if self._asked is None:
                self._store.wait_for_ends(self._config.generation.num_engine_ranks, _END_S)
        for link in self._links.values():
            link.line.send(Bye())
            link.hang_up()


@dataclass(frozen=True)
class _Asked:
    call: int
    prompts: tuple[Prompt, ...]
    sampling: Sampling


class _Link:
    """This rank's line to one restart of one engine."""

    def __init__(self, engine: int, restart: int, connection: Connection):
        self.engine, self.restart = engine, restart
        self.broadcast: WeightBroadcast | None = None
        self.lost = False
        self._inbox: Inbox = SimpleQueue()
        self.line = Channel(connection, self._inbox, self._ended)

    @classmethod
    def open(cls, store: EngineStore, engine: int, restart: int, key: bytes, wait_s: float) -> _Link:
        deadline = time.monotonic() + wait_s
        while True:
            restart, address = store.living(engine, restart, deadline - time.monotonic())
            try:
                connection = connect(address.host, address.port, key)
            except (OSError, EOFError, AuthenticationError):  # it has just died, and its rank is about to say so
                store.death(engine, restart, _REASON_S)
                continue
            return cls(engine, restart, connection)

    def messages(self) -> Iterator[Message]:
        """What the engine says, until the line ends."""
        while not self.lost or not self._inbox.empty():
            try:
                _, message = self._inbox.get(timeout=1.0)
            except Empty:
                continue
            if message is None:
                return
            yield message

    def hang_up(self) -> None:
        self.lost = True
        self.line.close()

    def _ended(self) -> None:
        """By the listening thread."""
        self.lost = True
        if self.broadcast is not None:
            self.broadcast.abort()  # nobody waits in it for a rank that is gone
