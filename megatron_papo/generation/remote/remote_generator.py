"""Generation with vLLM on ranks of its own: the trainer's side. An engine's side begins in engine_supervisor.py.

The leader of each model-parallel group calls one engine (data rank d the engine d mod E) for the rollouts of its
group and shares the answers; rank 0 sends weights to all engines at once. Between `submit` and `collect` the trainer
may do as it likes. Where an engine dies, every rank of the trainer raises EngineLost at the same point.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

from megatron_papo.config import Config
from megatron_papo.config.derived import engine_dtype
from megatron_papo.distributed import accelerator
from megatron_papo.distributed.exchange import gather_objects
from megatron_papo.distributed.layout import Layout, world_group
from megatron_papo.distributed.rendezvous import world_store
from megatron_papo.generation.generator import EngineLost, Report, Sampling
from megatron_papo.generation.readings import Probe, probe_of
from megatron_papo.generation.remote.engine_client import REASON_S, EngineClient
from megatron_papo.generation.remote.engine_store import EngineStore
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
from megatron_papo.generation.vllm.vllm_requests import VllmFormat
from megatron_papo.model.observed import KINDS, LOGPROBS
from megatron_papo.types import Group, Metrics, Prompt

if TYPE_CHECKING:
    from megatron_papo.data.processor import Processor

_END_S = 20.0
"""Seconds that the engines may take to end once they are stopped."""


@dataclass(frozen=True)
class _PendingCall:
    """What `submit` has sent to an engine and `collect` will return."""

    number: int
    prompts: tuple[Prompt, ...]
    sampling: Sampling


class RemoteGenerator:
    """The `Generator` of separate engines. One call may be under way: `generate` is `submit` and `collect`."""

    def __init__(self, config: Config, processor: Processor, layout: Layout, report: Report | None = None):
        check_settings(config)
        self.policy_version: int | None = None
        self.forgotten_version: int | None = None  # engines on GPUs of their own do not sleep
        self._config, self._layout, self._report = config, layout, report
        self._format = VllmFormat.of(config, processor)
        self._world_store = world_store(config.parallel.timeout_s)
        self._store = EngineStore(self._world_store)
        num_engines = config.generation.engines
        self._own_engine = layout.data_rank % num_engines if layout.model_rank == 0 else None
        """The engine that this rank calls; None where it leads no model-parallel group."""
        own = [] if self._own_engine is None else [self._own_engine]
        self._engines = list(range(num_engines)) if layout.rank == 0 else own
        """The engines that this rank connects to: rank 0 to all of them."""
        if self._engines:
            self._key = read_key(config.run.dir, self._store.key_fingerprint(), KEY_WAIT_S)
        self._clients: dict[int, EngineClient] = {}
        self._restarts = dict.fromkeys(self._engines, 0)
        """The restart of each engine that this rank is connected to, or waits for."""
        self._broadcast: WeightBroadcast | None = None
        self._call_numbers = itertools.count()
        self._pending: _PendingCall | None = None
        self._metrics: Metrics = {}

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        self.submit(prompts, sampling)
        return self.collect()

    def submit(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        """Sends a call for rollouts and does not wait. The ranks of a model-parallel group call together."""
        if self.policy_version is None:
            raise RuntimeError("generate before the first load_weights: the generator has no weights")
        assert self._pending is None, "collect comes first"
        self._format.check(prompts, sampling)
        self._pending = _PendingCall(next(self._call_numbers), tuple(prompts), sampling)
        if self._own_engine is not None and prompts:
            requests = tuple(make_requests(prompts, sampling))
            by_place = {place: self._format.prompt(prompt, sampling) for place, prompt in enumerate(prompts)}
            self._clients[self._own_engine].send(Generate(self._pending.number, requests, by_place, sampling))

    def collect(self) -> list[Group]:
        """Waits for the rollouts of the last `submit`. All ranks of the trainer call together.

        Raises EngineLost, on all of them, when any engine has died; the call is forgotten then.
        """
        call, self._pending = self._pending, None
        assert call is not None, "submit comes first"
        answers = self._wait_for_answers(call)
        self._raise_where_lost("while it made rollouts")
        assert answers is not None
        self._metrics = {"engine/seconds": (answers.seconds, 1.0), "engine/prefix_cached": answers.prefix_cached}
        decode = self._format.processor.decode
        return groups_of(call.prompts, call.sampling, answers.answers, decode, answers.policy_version)

    def probe(self, prompt: Prompt, sampling: Sampling) -> Probe:
        (group,) = self.generate([prompt], sampling)
        rollout = group.rollouts[0]
        missing = dict.fromkeys((kind for kind in KINDS if kind != LOGPROBS), "the engine runs in other processes")
        return probe_of(prompt, rollout.response_ids, rollout.rollout_logprobs, {}, missing)

    def _wait_for_answers(self, call: _PendingCall) -> Answers | None:
        """The answers, on every rank of the model-parallel group; None when the engine is gone.

        Progress is shared with all of them too, or their watchdogs would take the wait for a stall.
        """
        messages = self._messages_of(call) if self._own_engine is not None else itertools.repeat(None)
        for message in messages:
            box = [message]
            if self._layout.model_group.size() > 1:
                dist.broadcast_object_list(box, group=self._layout.model_group, group_src=0)
            if not isinstance(box[0], GenerationProgress):
                return box[0]
            if self._report is not None:
                self._report(box[0].done, box[0].total)
        raise AssertionError("the last message is no progress")

    def _messages_of(self, call: _PendingCall) -> Iterator[GenerationProgress | Answers | None]:
        """What the engine sends of the call, on the leader: the last is the answers, or None when it is gone."""
        assert self._own_engine is not None and self.policy_version is not None
        if not call.prompts:
            yield Answers(call.number, (), self.policy_version, 0.0, (0.0, 0.0))
            return
        for message in self._clients[self._own_engine].messages():
            if isinstance(message, GenerationProgress | Answers) and message.call == call.number:
                yield message
                if isinstance(message, Answers):
                    return
        yield None

    def load_weights(self, named_tensors: Iterator[tuple[str, Tensor]], policy_version: int) -> None:
        """See `Generator`. Raises EngineLost, on all ranks alike, when an engine died of it or before."""
        assert self._pending is None, "weights are handed over when all rollouts have been collected"
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
        """Sends the weights to all engines, from rank 0; returns what they say is wrong with them."""
        clients = list(self._clients.values())
        dtype = accelerator.parameter_dtype(engine_dtype(self._config))
        name = "weights_" + "_".join(str(self._restarts[engine]) for engine in self._engines)

        def send_to_all(message: Message) -> None:
            for client in clients:
                client.send(message)

        send_to_all(Load(policy_version, name))
        try:
            broadcast = self._join_broadcast(name)
            broadcast.send(named_tensors, send_to_all, dtype, self._config.generation.bucket_mib * 2**20)
        except BroadcastBroken:
            for _ in named_tensors:
                pass
            for client in clients:  # engines that live cannot use half the weights either: they are restarted
                client.close()
            return None
        send_to_all(Loaded())
        answers = [next((m for m in client.messages() if isinstance(m, Loaded)), None) for client in clients]
        return next((answer.fault for answer in answers if answer is not None and answer.fault), None)

    def _join_broadcast(self, name: str) -> WeightBroadcast:
        if self._broadcast is None or self._broadcast.name != name:
            size = 1 + self._config.generation.num_engine_ranks
            self._broadcast = WeightBroadcast(name, self._world_store, 0, size)
            for client in self._clients.values():
                client.broadcast = self._broadcast
        return self._broadcast

    def _connect(self) -> None:
        """Connects to all engines of this rank that it is not connected to; waits until they can be called."""
        for engine in self._engines:
            if engine not in self._clients:
                wait_s = self._config.parallel.timeout_s
                client = EngineClient.open(self._store, engine, self._restarts[engine], self._key, wait_s)
                self._clients[engine], self._restarts[engine] = client, client.restart

    def _raise_where_lost(self, when: str) -> None:
        """Raises EngineLost on every rank of the trainer when any of them has lost an engine; all disconnect."""
        own = [(each.engine, each.restart, self._reason(each)) for each in self._clients.values() if each.lost]
        lost = [each for share in gather_objects(own, world_group()) for each in share]
        for engine, restart, _ in lost:
            if engine in self._clients and self._clients[engine].restart <= restart:
                self._clients.pop(engine).close()
                self._restarts[engine] = restart + 1
        if lost:
            self.policy_version = None
            reasons = {engine: f"engine {engine} died ({reason})" for engine, _, reason in reversed(lost)}
            raise EngineLost(f"{', '.join(reasons[engine] for engine in sorted(reasons))} {when}")

    def _reason(self, client: EngineClient) -> str:
        return self._store.death(client.engine, client.restart, REASON_S) or "its line broke"

    def restart(self) -> None:
        """Waits until every engine that was lost has been restarted."""
        self._connect()

    def take_metrics(self) -> Metrics:
        metrics, self._metrics = self._metrics, {}
        return metrics

    def close(self) -> None:
        """Stops the engines; waits for their end unless rollouts are under way, which nobody will collect."""
        if self._layout.rank == 0:
            self._store.stop()
            for client in self._clients.values():
                client.send(Stop())
            if self._pending is None:
                self._store.wait_for_ends(self._config.generation.num_engine_ranks, _END_S)
        for client in self._clients.values():
            client.send(Bye())
            client.close()
