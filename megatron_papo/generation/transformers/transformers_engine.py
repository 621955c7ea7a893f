"""Generation with Hugging Face transformers: a whole model on every rank, its weights handed over by the trainer.

The default where there is no GPU. Each rank of a model-parallel group answers a share of the group's rollouts, in
batches of `generation.batch_size` rows. Left out: splitting the generator's model over ranks, which vLLM does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_papo.config import Config
from megatron_papo.config.derived import engine_dtype
from megatron_papo.distributed import accelerator
from megatron_papo.distributed.layout import Layout
from megatron_papo.generation.generator import Report, Sampling
from megatron_papo.generation.readings import ActivationRecorder, Probe, probe_of
from megatron_papo.generation.reference_model import classes_of_model, empty_model, read_config, shapes_of
from megatron_papo.generation.requests import Answer, RolloutRequest, generate_in_shares, make_requests
from megatron_papo.generation.transformers.decoding import decode_batch
from megatron_papo.generation.weight_check import checked
from megatron_papo.model.family import family_of
from megatron_papo.model.shape import ModelShape
from megatron_papo.types import Group, Metrics, Prompt

if TYPE_CHECKING:
    from megatron_papo.data.processor import Processor


class TransformersGenerator:
    """The `Generator` of transformers. Its weights are undefined until the first `load_weights`; of the model's folder
    only `config.json` is read."""

    def __init__(self, config: Config, processor: Processor, layout: Layout, report: Report | None = None):
        device, dtype = accelerator.device(), accelerator.parameter_dtype(engine_dtype(config))
        shape = ModelShape.from_folder(processor.folder)
        self.model = empty_model(read_config(processor.folder, family_of(shape)), dtype, device)
        self.expected = shapes_of(self.model)
        self.batch_size = config.generation.batch_size
        self.processor, self.layout, self.report = processor, layout, report
        banned_ids = shape.banned_ids(processor.num_words)
        self.banned_ids = torch.tensor(banned_ids, dtype=torch.int64, device=device)
        self.eos_ids = torch.tensor(sorted(processor.eos_ids), dtype=torch.int64, device=device)
        self.policy_version: int | None = None
        self.forgotten_version: int | None = None

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        return generate_in_shares(
            prompts,
            sampling,
            self.layout,
            answer=lambda requests: self._answer(prompts, requests, sampling),
            decode=self.processor.decode,
            policy_version=self.policy_version,
        )

    def probe(self, prompt: Prompt, sampling: Sampling) -> Probe:
        requests = make_requests([prompt], sampling)[:1]
        with ActivationRecorder() as recorder:
            recorder.observe(classes_of_model(self.model).observed(self.model), prompt, sampling.max_response_tokens)
            (answer,) = decode_batch(self.model, [prompt], requests, sampling, self.banned_ids, self.eos_ids)
        return probe_of(prompt, answer.response_ids, answer.logprobs, recorder.parts(), missing={})

    def _answer(self, prompts: Sequence[Prompt], requests: list[RolloutRequest], sampling: Sampling) -> list[Answer]:
        # prompts of like length share a batch, so that little is padded; the sort is stable and keeps groups together
        by_length = sorted(requests, key=lambda request: prompts[request.prompt_index].inputs.token_ids_S.numel())
        answers: list[Answer] = []
        for start in range(0, len(by_length), self.batch_size):
            batch = by_length[start : start + self.batch_size]
            answers += decode_batch(self.model, prompts, batch, sampling, self.banned_ids, self.eos_ids)
            if self.report is not None:
                self.report(len(answers), len(requests))
        return answers

    def load_weights(self, named_tensors: Iterator[tuple[str, Tensor]], policy_version: int) -> None:
        self.policy_version = None  # a hand-over that fails half-way leaves no model to sample from
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, tensor in checked(named_tensors, self.expected):
                parameters[name].copy_(tensor)
        self.policy_version = policy_version

    def restart(self) -> None:
        raise AssertionError("the transformers engine is part of this process and never lost")

    def take_metrics(self) -> Metrics:
        return {}

    def close(self) -> None:
        self.model.to("meta")
