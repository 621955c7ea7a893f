"""Generation with Hugging Face transformers: a whole model on every rank, its weights handed over by the trainer.

The default where there is no GPU. Each rank of a model-parallel group answers a share of the group's rollouts, in
batches of `generation.batch_size` rows. Left out: sharding the generator's model over ranks; that is vLLM's part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.initialization import no_init_weights

from megatron_papo.config import Config
from megatron_papo.distributed import accelerator
from megatron_papo.distributed.layout import Layout
from megatron_papo.generation.generator import Report, Sampling
from megatron_papo.generation.requests import Answer, RolloutRequest, generate_in_shares, make_requests
from megatron_papo.generation.transformers.decoding import decode_batch
from megatron_papo.generation.weight_check import checked, read_config
from megatron_papo.model.shape import ModelShape
from megatron_papo.types import Group, Metrics, Prompt

if TYPE_CHECKING:
    from megatron_papo.data.processor import Processor


class TransformersGenerator:
    """See `Generator`. Weights are undefined until the first `load_weights`; only `config.json` is read."""

    def __init__(self, config: Config, processor: Processor, layout: Layout, report: Report | None = None):
        generation = config.generation
        dtype = accelerator.parameter_dtype(config.model.dtype if generation.dtype == "auto" else generation.dtype)
        device = accelerator.device()
        shape = ModelShape.from_folder(processor.folder)
        model_config = read_config(processor.folder)
        with no_init_weights(), device:
            model_config.dtype = dtype
            model = Qwen2_5_VLForConditionalGeneration._from_config(model_config, attn_implementation="sdpa")
        model.tie_weights()  # building without initial weights leaves a tied head untied
        # built in `dtype`: `.to(dtype)` would round the rotary frequencies too, which transformers keeps in fp32
        self.model = model.eval().requires_grad_(False)
        self.batch_size = config.generation.batch_size
        self.processor, self.layout, self.report = processor, layout, report
        banned_ids = shape.banned_ids(processor.num_words)
        self.banned_ids = torch.tensor(banned_ids, dtype=torch.int64, device=device)
        self.eos_ids = torch.tensor(sorted(processor.eos_ids), dtype=torch.int64, device=device)
        self.expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        self.policy_version: int | None = None
        self.forgotten_version: int | None = None

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        return generate_in_shares(
            prompts,
            sampling,
            self.layout,
            answer=lambda jobs: self._answer(prompts, jobs, sampling),
            decode=self.processor.decode,
            policy_version=self.policy_version,
        )

    def answer_alone(self, prompt: Prompt, sampling: Sampling) -> Answer:
        """The first rollout of the prompt, by this rank's own model, whatever other ranks do."""
        jobs = make_requests([prompt], sampling)[:1]
        return decode_batch(self.model, [prompt], jobs, sampling, self.banned_ids, self.eos_ids)[0]

    def _answer(self, prompts: Sequence[Prompt], jobs: list[RolloutRequest], sampling: Sampling) -> list[Answer]:
        # prompts of like length share a batch, so that little is padded; the sort is stable and keeps groups together
        by_length = sorted(jobs, key=lambda job: prompts[job.prompt_index].inputs.token_ids_S.numel())
        answers: list[Answer] = []
        for start in range(0, len(by_length), self.batch_size):
            batch = by_length[start : start + self.batch_size]
            answers += decode_batch(self.model, prompts, batch, sampling, self.banned_ids, self.eos_ids)
            if self.report is not None:
                self.report(len(answers), len(jobs))
        return answers

    def load_weights(self, named_tensors: Iterator[tuple[str, Tensor]], policy_version: int) -> None:
        self.policy_version = None  # a hand-over that fails half-way leaves no model to sample from
        wanted = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, tensor in checked(named_tensors, self.expected):
                wanted[name].copy_(tensor)
        self.policy_version = policy_version

    def restart(self) -> None:
        raise AssertionError("the transformers engine is part of this process and never lost")

    def take_metrics(self) -> Metrics:
        return {}

    def close(self) -> None:
        self.model.to("meta")
