"""When certificates are made, on which prompts, by which ranks; and that all ranks hear the same of it.

Every rank's engine answers every prompt, alone and seeded, and every model-parallel group scores those answers through
the schedule that trains. Hugging Face is asked on the first rank, for the answers of its group. What was found is
gathered over all ranks, so that all of them stop, or none. No random number that training draws is used up.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_papo.checkpoint.state_file import names_checkpoint
from megatron_papo.distributed.accelerator import has_gpu
from megatron_papo.distributed.exchange import gather_objects
from megatron_papo.distributed.layout import world_group
from megatron_papo.generation import EngineLost, Generator, Sampling
from megatron_papo.generation.vllm.start import trainer_state_kept
from megatron_papo.parity.certificate import Certificate, Sides
from megatron_papo.parity.certificate_files import Folder
from megatron_papo.parity.comparison import ENGINE, HUGGINGFACE, TRAINER, Case, compare
from megatron_papo.parity.inspection import inspect, precision_of
from megatron_papo.parity.limits import Limits
from megatron_papo.parity.prompts import prompts_to_certify
from megatron_papo.parity.reading import Precision, Reading
from megatron_papo.parity.trainer_side import read_trainer, trainer_precision
from megatron_papo.parity.transformers_side import HuggingFace, model_of, precision_that_fits, read_model
from megatron_papo.runtime.failures import RunStopped
from megatron_papo.training.console import say, warn
from megatron_papo.training.rollouts import recover, remind
from megatron_papo.training.session import Run, model_folder
from megatron_papo.types import Metrics, Prompt
from megatron_papo.weights.transfer import hf_tensors

Asked = tuple[int, tuple[int, ...]]
"""(which prompt, the response to it)."""


class Certifier:
    """Of one run; all ranks call each method together. The prompts are read once and kept."""

    def __init__(self, run: Run, generator: Generator):
        self._run, self._generator = run, generator
        self._limits = Limits(run.config)
        self._folder = Folder(run.folder / "certificate", partial(warn, run))
        self._prompts: Sequence[Prompt] | None = None
        self.reason_to_stop = ""
        """What departed after the last hand-over, or nothing."""

    def at_start(self, step: int, *, weights_moved: bool) -> Certificate:
        """Of all parties, before step `step`. `weights_moved`: they are no longer those of `model`."""
        with self._run.clock.stage("certify"), trainer_state_kept():
            return self._certify(step, at_start=True, weights_moved=weights_moved)

    def page_of(self, step: int) -> Path:
        """Where the writer puts the page of a certificate."""
        return self._folder.page_of(step)

    def start_or_stop(self, step: int) -> None:
        """Raises RunStopped, with the part that departs, where a run is not to begin at `step`; as
        `certify.at_start` says."""
        if not self._run.config.certify.at_start:
            return
        certificate = self.at_start(step, weights_moved=step > 0)
        if certificate.departure is not None:
            raise RunStopped(certificate.verdict)
        say(self._run, certificate.verdict)

    def after_hand_over(self, step: int) -> Metrics:
        """Of trainer and engine, after `step` steps; sets `reason_to_stop`. As `certify.after_hand_over` says."""
        if not self._run.config.certify.after_hand_over:
            return {}
        with self._run.clock.stage("certify"), trainer_state_kept():
            certificate = self._certify(step, at_start=False, weights_moved=True)
        self.reason_to_stop = certificate.verdict if certificate.departure is not None else ""
        return {f"certify/logprobs_{name}": (value, 1.0) for name, value in certificate.logprobs_gap().items()}

    def _certify(self, step: int, *, at_start: bool, weights_moved: bool) -> Certificate:
        run, prompts = self._run, self._prompts_together()
        answers = [self._ask_engine(prompt) for prompt in prompts]
        cases, sides = self._read(prompts, answers, self._sides(weights_moved), at_start)
        findings = compare(cases, sides.precisions, self._limits, run.layout.rank)
        certificate = Certificate.of(
            step=step,
            at_start=at_start,
            findings=[each for share in gather_objects(findings, world_group()) for each in share],
            cases=cases,
            responses=[run.processor.tokenizer.convert_ids_to_tokens(list(ids)) for ids, _ in answers],
            sides=sides,
        )
        if run.is_writer:
            self._folder.write(certificate)
        return certificate

    def _read(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[tuple[tuple[int, ...], Reading]],
        sides: Sides,
        at_start: bool,
    ) -> tuple[list[Case], Sides]:
        """What all parties make of this rank's answers."""
        asked = self._asked([ids for ids, _ in answers])
        trainer = {each: read_trainer(self._run, prompts[each[0]], each[1]) for each in asked}
        other: dict[Asked, Reading] = {}
        if at_start and self._run.config.certify.huggingface:
            other, sides = self._ask_hugging_face(prompts, asked, sides)
        cases = []
        for index, (ids, engine) in enumerate(answers):
            each = index, ids
            readings = {HUGGINGFACE: other.get(each), TRAINER: trainer[each], ENGINE: engine}
            cases.append(Case(prompts[index].id, _present(readings)))
        return cases, sides

    def _prompts_together(self) -> Sequence[Prompt]:
        if self._prompts is None:
            self._prompts = _together(lambda: prompts_to_certify(self._run.config, self._run.processor))
        return self._prompts

    def _ask_engine(self, prompt: Prompt) -> tuple[tuple[int, ...], Reading]:
        """This rank's engine; one that dies is started anew, as often as in training."""
        config = self._run.config
        sampling = Sampling(
            group_size=1,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            max_response_tokens=min(config.certify.tokens, config.generation.max_response_tokens),
            seed=config.run.seed,
        )
        while True:
            remind(self._run, self._generator)
            version = self._generator.policy_version
            try:
                answer, reading = _together(lambda: inspect(self._generator, prompt, sampling))
                return answer.response_ids, reading
            except EngineLost as lost:
                recover(self._run, self._generator, lost, version)

    def _asked(self, responses: Sequence[tuple[int, ...]]) -> list[Asked]:
        """Every prompt with each response that an engine of this model-parallel group gave; mostly one."""
        shares = gather_objects(list(responses), self._run.layout.model_group)
        return sorted({(index, ids) for share in shares for index, ids in enumerate(share)})

    def _sides(self, weights_moved: bool) -> Sides:
        config, model = self._run.config, self._run.config.model
        own = not weights_moved and not model.random_init and not names_checkpoint(model.checkpoint or model.path or "")
        return Sides(
            precisions={TRAINER: trainer_precision(self._run), ENGINE: precision_of(config), HUGGINGFACE: "float32"},
            engine=f"{config.generation.engine}, {config.generation.placement}",
            layout={"ranks": self._run.layout.world_size, **config.parallel.model_dump(mode="json")},
            huggingface_weights="model.path" if own else "the trainer's",
        )

    def _ask_hugging_face(
        self, prompts: Sequence[Prompt], asked: Sequence[Asked], sides: Sides
    ) -> tuple[dict[Asked, Reading], Sides]:
        """What transformers reads, on the ranks of the first model-parallel group; elsewhere nothing."""
        run = self._run
        folder = model_folder(run.config)
        found = _together(lambda: precision_that_fits(folder) if run.is_writer else None)
        precision = gather_objects(found, world_group())[0]
        if precision is None:
            return {}, sides.without_huggingface("the host's memory does not hold another copy of the model")
        sides = sides.with_huggingface(precision)
        if sides.huggingface_weights == "model.path":
            model = _together(lambda: read_model(folder, precision) if run.is_writer else None)
        else:
            model = _together(lambda: self._with_own_weights(precision))

        def read() -> dict[Asked, Reading]:
            if not run.is_writer:
                return {}
            if has_gpu():
                torch.set_num_threads(os.cpu_count() or 1)  # this once: the other ranks wait
            theirs = HuggingFace(model, folder, run.config.data, run.banned_ids)
            return {each: theirs.read(prompts[each[0]], each[1]) for each in asked}

        return gather_objects(_together(read), run.layout.model_group)[0], sides

    def _with_own_weights(self, precision: Precision) -> Any:
        """A collective of the first model-parallel group, whose weights they are."""
        if self._run.layout.data_rank > 0:
            return None
        tensors = hf_tensors(self._run.policy, self._run.shape, module_names=True)
        if self._run.is_writer:
            return model_of(model_folder(self._run.config), precision, tensors)
        for _ in tensors:
            pass
        return None


def _present(readings: dict[str, Reading | None]) -> dict[str, Reading]:
    return {party: reading for party, reading in readings.items() if reading is not None}


def _together[Value](work: Callable[[], Value]) -> Value:
    """The value of `work`; when it fails on any rank, a ValueError with the first reason on all, so that none goes on
    to wait for one that is gone. What it exchanges itself it must exchange before it can fail."""
    value, fault = None, None
    try:
        value = work()
    except EngineLost:  # on all ranks alike
        raise
    except Exception as error:
        fault = error
    reasons = gather_objects(None if fault is None else f"{type(fault).__name__}: {fault}", world_group())
    for rank, reason in enumerate(reasons):
        if reason is not None:
            raise ValueError(f"certificate: rank {rank}: {reason}") from fault
    return value  # type: ignore[return-value]
