"""When certificates are made, on which prompts and by which ranks; all ranks get the same verdict.

Every rank's engine answers every prompt by itself and seeded, and every model-parallel group scores those answers
through the schedule that trains. Hugging Face reads them on the first rank, for the answers of its group. Findings are
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
from megatron_papo.config.derived import model_folder, weights_folder
from megatron_papo.distributed.accelerator import has_gpu
from megatron_papo.distributed.agreement import RanksFailed, fail_together
from megatron_papo.distributed.exchange import gather_objects
from megatron_papo.distributed.layout import world_group
from megatron_papo.generation import EngineLost, Generator, Sampling
from megatron_papo.generation.readings import Precision, Probe, Reading, engine_precision
from megatron_papo.generation.reference_model import read_model
from megatron_papo.generation.vllm.start import trainer_state_kept
from megatron_papo.model.family import family_of
from megatron_papo.parity.certificate import Certificate, Sides
from megatron_papo.parity.certificate_files import CertificateFolder
from megatron_papo.parity.chosen_prompts import prompts_to_certify
from megatron_papo.parity.comparison import ENGINE, HUGGINGFACE, TRAINER, Case, compare
from megatron_papo.parity.limits import Limits
from megatron_papo.parity.trainer_side import read_trainer, trainer_precision
from megatron_papo.parity.transformers_side import HuggingFace, model_of, precision_that_fits
from megatron_papo.runtime.failures import RunStopped
from megatron_papo.training.console import say, warn
from megatron_papo.training.rollouts import give_weights_again, recover
from megatron_papo.training.session import Run
from megatron_papo.types import Metrics, Prompt
from megatron_papo.weights.transfer import hf_tensors

Answered = tuple[int, tuple[int, ...]]
"""(place of a prompt among those of the certificate, token ids of a response to it)."""


class Certifier:
    """Makes the certificates of one run; all ranks call each method together. The prompts are read once and kept."""

    def __init__(self, run: Run, generator: Generator):
        self._run, self._generator = run, generator
        self._limits = Limits(run.config)
        self._folder = CertificateFolder(run.folder / "certificate", partial(warn, run))
        self._prompts: Sequence[Prompt] | None = None
        self.reason_to_stop = ""
        """The verdict after the last hand-over, where a part departed; else empty."""

    def at_start(self, step: int, *, weights_moved: bool) -> Certificate:
        """The certificate of all parties before step `step`. `weights_moved`: they are no longer those of `model`."""
        with self._run.clock.stage("certify"), trainer_state_kept():
            return self._certify(step, at_start=True, weights_moved=weights_moved)

    def page_of(self, step: int) -> Path:
        """Where the writer puts the page of a certificate."""
        return self._folder.page_of(step)

    def start_or_stop(self, step: int) -> None:
        """Makes the certificate before step `step`, where `certify.at_start` asks for it.

        Raises RunStopped, with the part that departs, where the run must not begin.
        """
        if not self._run.config.certify.at_start:
            return
        certificate = self.at_start(step, weights_moved=step > 0)
        if certificate.departure is not None:
            raise RunStopped(certificate.verdict)
        say(self._run, certificate.verdict)

    def after_hand_over(self, step: int) -> Metrics:
        """Compares trainer and engine after `step` steps, where `certify.after_hand_over` asks for it.

        Sets `reason_to_stop`; returns how far the log-probs are apart.
        """
        if not self._run.config.certify.after_hand_over:
            return {}
        with self._run.clock.stage("certify"), trainer_state_kept():
            certificate = self._certify(step, at_start=False, weights_moved=True)
        self.reason_to_stop = certificate.verdict if certificate.departure is not None else ""
        return {f"certify/logprobs_{name}": (value, 1.0) for name, value in certificate.logprobs_gap().items()}

    def _certify(self, step: int, *, at_start: bool, weights_moved: bool) -> Certificate:
        run, prompts = self._run, self._read_prompts()
        probes = [self._probe_engine(prompt) for prompt in prompts]
        cases, sides = self._read(prompts, probes, self._sides(weights_moved), at_start)
        findings = compare(cases, sides.precisions, self._limits, run.layout.rank)
        certificate = Certificate.of(
            step=step,
            at_start=at_start,
            findings=[each for share in gather_objects(findings, world_group()) for each in share],
            cases=cases,
            responses=[run.processor.tokenizer.convert_ids_to_tokens(list(probe.response_ids)) for probe in probes],
            sides=sides,
        )
        if run.is_writer:
            self._folder.write(certificate)
        return certificate

    def _read(
        self, prompts: Sequence[Prompt], probes: Sequence[Probe], sides: Sides, at_start: bool
    ) -> tuple[list[Case], Sides]:
        """What every party computes for the answers of this rank's engine."""
        answered = self._answered([probe.response_ids for probe in probes])
        trainer = {each: read_trainer(self._run, prompts[each[0]], each[1]) for each in answered}
        other: dict[Answered, Reading] = {}
        if at_start and self._run.config.certify.huggingface:
            other, sides = self._read_hugging_face(prompts, answered, sides)
        cases = []
        for index, probe in enumerate(probes):
            each = index, probe.response_ids
            readings = {HUGGINGFACE: other.get(each), TRAINER: trainer[each], ENGINE: probe.reading}
            cases.append(Case(prompts[index].id, _present(readings)))
        return cases, sides

    def _read_prompts(self) -> Sequence[Prompt]:
        if self._prompts is None:
            self._prompts = _on_all_ranks(lambda: prompts_to_certify(self._run.config, self._run.processor))
        return self._prompts

    def _probe_engine(self, prompt: Prompt) -> Probe:
        """Probes this rank's engine; one that dies is restarted, as often as in training."""
        config = self._run.config
        sampling = Sampling(
            group_size=1,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            max_response_tokens=min(config.certify.tokens, config.generation.max_response_tokens),
            seed=config.run.seed,
        )

        def probe() -> Probe | EngineLost:
            try:
                return self._generator.probe(prompt, sampling)
            except EngineLost as lost:  # on all ranks alike
                return lost

        while True:
            give_weights_again(self._run, self._generator)
            version = self._generator.policy_version
            result = _on_all_ranks(probe)
            if isinstance(result, Probe):
                return result
            recover(self._run, self._generator, result, version)

    def _answered(self, responses: Sequence[tuple[int, ...]]) -> list[Answered]:
        """Every prompt with each response that an engine of this model-parallel group gave; mostly there is one."""
        shares = gather_objects(list(responses), self._run.layout.model_group)
        return sorted({(index, ids) for share in shares for index, ids in enumerate(share)})

    def _sides(self, weights_moved: bool) -> Sides:
        config, model = self._run.config, self._run.config.model
        own = not weights_moved and not model.random_init and not names_checkpoint(weights_folder(config))
        return Sides(
            precisions={
                TRAINER: trainer_precision(self._run),
                ENGINE: engine_precision(config),
                HUGGINGFACE: "float32",
            },
            engine=f"{config.generation.engine}, {config.generation.placement}",
            layout={"ranks": self._run.layout.world_size, **config.parallel.model_dump(mode="json")},
            huggingface_weights="model.path" if own else "the trainer's",
        )

    def _read_hugging_face(
        self, prompts: Sequence[Prompt], answered: Sequence[Answered], sides: Sides
    ) -> tuple[dict[Answered, Reading], Sides]:
        """What transformers computes, on the ranks of the first model-parallel group; nothing on the others."""
        run = self._run
        folder, family = model_folder(run.config), family_of(run.shape)
        fitting = _on_all_ranks(lambda: precision_that_fits(folder, family) if run.is_writer else None)
        precision = gather_objects(fitting, world_group())[0]
        if precision is None:
            return {}, sides.without_huggingface("the host's memory does not hold another copy of the model")
        sides = sides.with_huggingface(precision)
        if sides.huggingface_weights == "model.path":
            dtype = getattr(torch, precision)
            model = _on_all_ranks(lambda: read_model(folder, family, dtype) if run.is_writer else None)
        else:
            model = _on_all_ranks(lambda: self._with_own_weights(precision))

        def read() -> dict[Answered, Reading]:
            if not run.is_writer:
                return {}
            if has_gpu():
                torch.set_num_threads(os.cpu_count() or 1)  # this once: the other ranks wait
            reference = HuggingFace(model, folder, run.config.data, run.banned_ids)
            return {each: reference.read(prompts[each[0]], each[1]) for each in answered}

        return gather_objects(_on_all_ranks(read), run.layout.model_group)[0], sides

    def _with_own_weights(self, precision: Precision) -> Any:
        """The writer's model of transformers with the trainer's weights; None on other ranks. A collective of the first
        model-parallel group, whose weights they are."""
        if self._run.layout.data_rank > 0:
            return None
        tensors = hf_tensors(self._run.policy, self._run.shape, module_names=True)
        if self._run.is_writer:
            return model_of(model_folder(self._run.config), family_of(self._run.shape), precision, tensors)
        for _ in tensors:
            pass
        return None


def _present(readings: dict[str, Reading | None]) -> dict[str, Reading]:
    return {party: reading for party, reading in readings.items() if reading is not None}


def _on_all_ranks[Value](action: Callable[[], Value]) -> Value:
    """What `action` returns on this rank; where it failed on any, ValueError on every rank with the first one's reason.

    Collectives within `action` are safe only where no rank can fail before they are through.
    """
    errors: list[Exception] = []

    def attempt() -> Value:
        try:
            return action()
        except Exception as error:  # of any type: transformers and vLLM have their own
            errors.append(error)
            raise ValueError(f"{type(error).__name__}: {error}") from error

    try:
        return fail_together(world_group(), attempt)
    except RanksFailed as failed:
        first = failed.faults[0]
        raise ValueError(f"certificate: rank {first.rank}: {first.reason}") from next(iter(errors), failed)
