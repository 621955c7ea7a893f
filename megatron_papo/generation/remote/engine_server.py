"""The serving loop of a separate engine, on each of its ranks: messages in, a token for every running request, answers
out.

The first rank takes messages in by its front end and shares them with the other ranks, so that all of them run the same
scheduler over the same requests (vLLM's external launcher). Requests of several ranks of the trainer join and leave one
batch. An error ends the process: the supervisor restarts the engine.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megatron_papo.config import Config
from megatron_papo.generation.remote.channel import Channel
from megatron_papo.generation.remote.engine_store import EngineRank
from megatron_papo.generation.remote.front_end import FrontEnd
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
from megatron_papo.generation.remote.weight_broadcast import WeightBroadcast
from megatron_papo.generation.requests import Answer, RolloutRequest
from megatron_papo.generation.vllm.vllm_engine import VllmGenerator

_PROGRESS_S = 0.5
"""Seconds between two reports of a call's progress."""
_POLL_STEPS = 8
"""Tokens after which the ranks of an engine look for new messages: looking together costs them an exchange."""
_IDLE_S = 10.0
"""Seconds after which they do so while nothing runs, so that no exchange runs into its time limit."""


@dataclass
class _Call:
    """A call of one rank of the trainer that is being answered."""

    channel: Channel | None
    """Where the answers go; None on the engine's other ranks."""
    generate: Generate
    started: float = field(default_factory=time.monotonic)
    reported: float = 0.0
    """When its progress was last reported."""
    answers: list[Answer] = field(default_factory=list)
    num_cached: int = 0
    """Prompt tokens of the answers whose keys and values were cached."""
    num_read: int = 0
    """All prompt tokens of the answers."""


class EngineServer:
    """Serves the trainer's ranks until one of them says that no more calls will come."""

    def __init__(
        self,
        config: Config,
        generator: VllmGenerator,
        front_end: FrontEnd | None,
        store: dist.Store,
        engine_rank: EngineRank,
    ):
        """`front_end` is None on all ranks of the engine but the first."""
        self._config, self._generator, self._front_end = config, generator, front_end
        self._store, self._engine_rank = store, engine_rank
        self._running: dict[str, tuple[_Call, RolloutRequest]] = {}
        """vLLM's number of a request -> the call that it belongs to, and what it answers."""
        self._pending: deque[tuple[Channel | None, Message | None]] = deque()
        """Messages that have come in and are not handled yet."""
        self._broadcast: WeightBroadcast | None = None
        self._closing: set[Channel | None] = set()
        """Channels whose rank has said that it is about to close them."""
        self._num_steps = 0

    def serve(self) -> None:
        """Answers messages and steps the engine, until a message says to stop."""
        while True:
            if not self._running or self._is_only_rank or self._num_steps % _POLL_STEPS == 0:
                self._fetch(wait=not self._running)
            while self._pending:
                channel, message = self._pending.popleft()
                if isinstance(message, Stop):
                    return
                self._handle(channel, message)
            if self._running:
                self._step()

    @property
    def _is_only_rank(self) -> bool:
        return self._generator.engine_group is None

    def _fetch(self, wait: bool) -> None:
        """Adds the messages that have come in to `_pending`, on all ranks of the engine alike.

        `wait`: waits for a first one, `_IDLE_S` seconds at most.
        """
        received: list[tuple[Channel, Message | None]] = []
        if self._front_end is not None:
            received = self._front_end.messages(_IDLE_S if wait else 0.0)
        if self._is_only_rank:
            self._pending.extend(received)
            return
        box = [[message for _, message in received]]
        dist.broadcast_object_list(box, group=self._generator.engine_group, group_src=0)
        channels: list[Channel | None] = [channel for channel, _ in received] or [None] * len(box[0])
        self._pending.extend(zip(channels, box[0]))

    def _handle(self, channel: Channel | None, message: Message | None) -> None:
        if isinstance(message, Generate):
            self._begin(_Call(channel, message))
        elif isinstance(message, Load):
            self._load(channel, message)
        elif isinstance(message, Bye):
            self._closing.add(channel)
        else:
            assert message is None, message
            if channel not in self._closing and channel is not None:
                # that rank takes this engine for lost and waits for its restart
                raise RuntimeError("a rank of the trainer hung up")

    def _begin(self, call: _Call) -> None:
        generate, vllm = call.generate, self._generator.format
        prompts = [generate.prompts[request.prompt_index].as_input() for request in generate.requests]
        params = [vllm.params(request, generate.sampling) for request in generate.requests]
        numbers = self._generator.llm.enqueue(prompts, params, use_tqdm=False)
        for number, request in zip(numbers, generate.requests, strict=True):
            self._running[number.partition("-")[0]] = call, request  # vLLM adds letters of its own to its count

    def _step(self) -> None:
        self._num_steps += 1
        for output in self._generator.llm.llm_engine.step():
            if not output.finished:
                continue
            call, request = self._running.pop(output.request_id)
            prompt = call.generate.prompts[request.prompt_index]
            call.answers.append(self._generator.format.answer(request, prompt, output))  # type: ignore[arg-type]
            call.num_read += len(output.prompt_token_ids or ())
            call.num_cached += output.num_cached_tokens or 0  # type: ignore[union-attr]
            self._report(call)

    def _report(self, call: _Call) -> None:
        """Sends the answers where they are complete, else the progress from time to time."""
        if call.channel is None:
            return
        number, done, total, now = call.generate.call, len(call.answers), len(call.generate.requests), time.monotonic()
        if done == total:
            version = self._generator.policy_version
            assert version is not None
            cached = (float(call.num_cached), float(call.num_read))
            call.channel.send(Answers(number, tuple(call.answers), version, now - call.started, cached))
        elif now - call.reported > _PROGRESS_S:
            call.reported = now
            call.channel.send(GenerationProgress(number, done, total))

    def _load(self, channel: Channel | None, load: Load) -> None:
        """Takes new weights; a fault of theirs is reported to the trainer, any other ends this engine."""
        assert not self._running, "weights come when all rollouts have been answered"
        fault = None
        if self._broadcast is None or self._broadcast.name != load.broadcast:
            self._broadcast = self._join_broadcast(load.broadcast)
        try:
            self._generator.load_weights(self._arriving(self._broadcast), load.policy_version)
        except ValueError as error:
            fault = str(error)
        if channel is not None:
            channel.send(Loaded(fault))

    def _join_broadcast(self, name: str) -> WeightBroadcast:
        generation, engine_rank = self._config.generation, self._engine_rank
        rank = 1 + engine_rank.engine * generation.tensor + engine_rank.rank
        broadcast = WeightBroadcast(name, self._store, rank, size=1 + generation.num_engine_ranks)
        if self._front_end is not None:
            self._front_end.broadcast = broadcast
        return broadcast

    def _arriving(self, broadcast: WeightBroadcast) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of a hand-over, as they come."""
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
