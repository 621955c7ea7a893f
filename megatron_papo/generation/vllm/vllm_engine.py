"""Generation with vLLM, in the trainer's own processes: the same ranks train and generate, one after the other.

An engine spans `generation.tensor` consecutive ranks (vLLM's external launcher: each rank runs the same scheduler over
the same requests); with 1, every rank has an engine of its own. Of the model's folder only config, tokenizer and
processor files are read; weights come from the trainer. Left out: pipeline parallelism of the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_papo.config import Config
from megatron_papo.distributed.exchange import gather_objects
from megatron_papo.distributed.layout import Layout, world_group
from megatron_papo.generation.generator import EngineLost, Report, Sampling
from megatron_papo.generation.readings import Probe
from megatron_papo.generation.reference_model import expected_shapes, read_config
from megatron_papo.generation.requests import Answer, RolloutRequest, generate_in_shares, make_requests
from megatron_papo.generation.vllm.family_module import vllm_module
from megatron_papo.generation.vllm.probe import probe_engine
from megatron_papo.generation.vllm.sleep import (
    Sleeper,
    forget_weights,
    free_remains,
    keep_allocators,
    refill_zeros,
    unwritten,
)
from megatron_papo.generation.vllm.start import (
    check,
    check_bans,
    end,
    engine_group_of,
    remove_leftovers,
    shm_name_of,
    sleeps,
    start,
    trainer_state_kept,
)
from megatron_papo.generation.vllm.vllm_requests import VllmFormat, VllmPrompt
from megatron_papo.generation.weight_check import checked
from megatron_papo.model.family import family_of
from megatron_papo.model.parameter_map import parameter_names
from megatron_papo.types import Group, Metrics, Prompt

if TYPE_CHECKING:
    from vllm import RequestOutput

    from megatron_papo.data.processor import Processor


class VllmGenerator:
    """The `Generator` of vLLM. Its engine starts with dummy weights; `generate` refuses until the first
    `load_weights`."""

    def __init__(self, config: Config, processor: Processor, layout: Layout, report: Report | None = None):
        check(config, layout)
        self.processor, self.layout, self.report = processor, layout, report
        self.format = VllmFormat.of(config, processor)
        self.family = family_of(self.format.shape)
        self.in_vllm = vllm_module(self.family)
        self.expected = expected_shapes(read_config(processor.folder, self.family))
        self.config = config
        self.engine_group = engine_group_of(layout, config.generation.tensor)
        self.metrics: Metrics = {}
        self._start()

    def _start(self) -> None:
        self.policy_version: int | None = None
        self.forgotten_version: int | None = None
        self.shm_name = shm_name_of(self.engine_group)
        remove_leftovers()
        self.llm = start(self.config, self.processor, self.layout, self.shm_name, self.format.max_model_len)
        check_bans(len(self.format.banned_ids), self.llm)
        self.sleeper = Sleeper(self.llm, sleeps(self.config), self.config.generation.keep_weights_asleep)
        self.sleeper.sleep()

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        self.format.check(prompts, sampling)
        self.sleeper.wake()
        groups = self._generate(prompts, sampling)
        self._sleep()
        return groups

    def _sleep(self) -> None:
        self.sleeper.sleep()
        if self.sleeper.forgets and self.policy_version is not None:
            self.policy_version, self.forgotten_version = None, self.policy_version

    def probe(self, prompt: Prompt, sampling: Sampling) -> Probe:
        def answer_alone(read: Callable[[], None]) -> Answer:
            return self._answer_alone(prompt, sampling, read)

        return probe_engine(self.llm, self.in_vllm, prompt, sampling.max_response_tokens, answer_alone)

    def _answer_alone(self, prompt: Prompt, sampling: Sampling, read: Callable[[], None]) -> Answer:
        """The first rollout of the prompt, by this rank's own engine, for which nothing that the engine keeps of other
        prompts is used, and of which it keeps nothing.

        `read` is called before the engine sleeps again, which takes its tensors out of reach.
        """
        self.format.check([prompt], sampling)
        if self.policy_version is None:
            raise RuntimeError("answer before the first load_weights: the generator has no weights")
        self.sleeper.wake()
        self._forget_prompts()
        metrics, requests = dict(self.metrics), make_requests([prompt], sampling)[:1]
        (answer,) = self._run(requests, [self.format.prompt(prompt, sampling)], sampling)
        self.metrics = metrics
        self._forget_prompts()
        read()
        self._sleep()
        return answer

    def _generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        return generate_in_shares(
            prompts,
            sampling,
            self.layout,
            answer=lambda requests: self._answer(prompts, requests, sampling),
            decode=self.processor.decode,
            policy_version=self.policy_version,
        )

    def _answer(self, prompts: Sequence[Prompt], requests: list[RolloutRequest], sampling: Sampling) -> list[Answer]:
        """The ranks of an engine run the union of their shares together; each keeps its own answers."""
        places = {request.prompt_index for request in requests}
        prompt_at = {place: self.format.prompt(prompts[place], sampling) for place in places}
        own = [prompt_at[request.prompt_index] for request in requests]
        if self.engine_group is None:
            return self._run(requests, own, sampling)
        shares = gather_objects((requests, own), self.engine_group)
        all_requests = [request for share, _ in shares for request in share]
        answers = self._run(all_requests, [prompt for _, share in shares for prompt in share], sampling)
        first = sum(len(share) for share, _ in shares[: dist.get_rank(self.engine_group)])
        return answers[first : first + len(requests)]

    def _run(self, requests: list[RolloutRequest], prompts: list[VllmPrompt], sampling: Sampling) -> list[Answer]:
        """Answers to `requests`, in their order; `prompts` has the prompt of each. Raises EngineLost on all ranks."""
        outputs: list[RequestOutput] = []
        fault = None
        try:
            with trainer_state_kept():
                self._serve(requests, prompts, sampling, outputs)
        except Exception as error:  # whatever it is: the engine's state is unknown now
            fault = f"{type(error).__name__}: {error}"
        self._raise_where_lost(fault)
        outputs.sort(key=lambda output: int(output.request_id))  # numbered as they were enqueued
        assert len(outputs) == len(requests)
        return [self.format.answer(*each) for each in zip(requests, prompts, outputs)]

    def _serve(
        self,
        requests: list[RolloutRequest],
        prompts: list[VllmPrompt],
        sampling: Sampling,
        outputs: list[RequestOutput],
    ) -> None:
        """Runs all requests together, each joining and leaving the batch as there is room; appends to `outputs`."""
        params = [self.format.params(request, sampling) for request in requests]
        self.llm.enqueue([prompt.as_input() for prompt in prompts], params, use_tqdm=False)
        while self.llm.llm_engine.has_unfinished_requests():
            outputs += [output for output in self.llm.llm_engine.step() if output.finished]
            if self.report is not None:
                self.report(len(outputs), len(requests))
        read = sum(len(output.prompt_token_ids or ()) for output in outputs)
        cached = sum(output.num_cached_tokens or 0 for output in outputs)
        before = self.metrics.get("engine/prefix_cached", (0.0, 0.0))
        self.metrics["engine/prefix_cached"] = before[0] + cached, before[1] + read

    def _raise_where_lost(self, fault: str | None) -> None:
        """Raises EngineLost on every rank of the world when any rank's engine died: they restart together."""
        for rank, reason in enumerate(gather_objects(fault, world_group())):
            if reason is not None:
                raise EngineLost(f"the engine of rank {rank} died: {reason}")

    def load_weights(self, named_tensors: Iterator[tuple[str, Tensor]], policy_version: int) -> None:
        self.policy_version = None
        self.sleeper.wake_weights()
        if self.sleeper.forgets:
            self.llm.apply_model(forget_weights)
            self.llm.apply_model(partial(refill_zeros, names=self.in_vllm.ZEROS))
        names = parameter_names(self.format.shape)
        embedding, head = names.module_name(names.EMBEDDING), names.module_name(names.HEAD)
        # a tied head is handed over like the embedding: on the CPU vLLM keeps a packed copy of it
        twice = {embedding: (embedding, head)} if self.format.shape.tie_word_embeddings else {}
        with trainer_state_kept(), torch.no_grad():
            self.llm.start_weight_update()
            for name, tensor in checked(named_tensors, self.expected):
                for own_name in twice.get(name, (name,)):
                    self.llm.update_weights({"update_info": {"name": own_name, "tensor": tensor}})
            self.llm.finish_weight_update()
            self._forget_prompts()
        if self.sleeper.forgets:
            (left,) = self.llm.apply_model(unwritten)
            assert not left, f"the hand-over left out {', '.join(left[:10])}, which the engine forgot as it slept"
        self.policy_version, self.forgotten_version = policy_version, None

    def _forget_prompts(self) -> None:
        """Drops everything computed so far, with weights that may be old: keys and values, and image features."""
        engine = self.llm.llm_engine
        engine.reset_mm_cache()
        engine.reset_encoder_cache()
        if not engine.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache: requests are still running")

    def restart(self) -> None:
        self.close()
        free_remains()  # the old engine's weights and cache go before the new one's come
        self._start()

    def take_metrics(self) -> Metrics:
        metrics, self.metrics = self.metrics, {}
        if self.sleeper.freed_bytes:
            metrics["engine/freed_gib_max"] = self.sleeper.freed_bytes / 2**30, 1.0
        return metrics

    def close(self) -> None:
        self.sleeper.wake()  # vLLM unmaps all that its allocator lists, and what sleeps is unmapped already
        keep_allocators()
        end(self.llm, self.in_vllm.CACHED_METHODS)
        del self.llm, self.sleeper
        for file in Path("/dev/shm").glob(f"*{self.shm_name}*"):
            file.unlink(missing_ok=True)  # every rank of the engine has it mapped; vLLM leaves the name behind
