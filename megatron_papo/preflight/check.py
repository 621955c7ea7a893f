"""`papo check`: everything that can be known before a rank starts, a line a fault.

The inputs (preflight/inputs.py), the files of the model folder (preflight/model_files.py), the layout with ranks, shape
and memory (preflight/layout_faults.py), the packages that the verb imports, the run folder with room for all that will
stand in it (preflight/disk.py), and, when all of this is well, the hub and wandb (preflight/network.py). A cluster job
runs it once, on its first node, before its ranks. Leaves out what only the ranks see: the data's rows, whether
activations fit. Imports no torch.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_papo.config import Config, plain_tree
from megatron_papo.config.data_sources import source_entries, source_key
from megatron_papo.config.derived import model_folder_or_none
from megatron_papo.costs import full_rows
from megatron_papo.costs.memory import GIB, gpu_bytes, stage_memory
from megatron_papo.distributed.rank_arithmetic import data_ranks
from megatron_papo.model.shape import ModelShape
from megatron_papo.preflight.disk import disk_need, faults_of_disk
from megatron_papo.preflight.inputs import READS, fault_of_run_dir, faults_of_inputs, find_module
from megatron_papo.preflight.layout_faults import faults_of_layout, num_engine_ranks, warnings_of_layout
from megatron_papo.preflight.model_files import fault_of_missing_model, fault_of_processor, faults_of_model_files
from megatron_papo.preflight.network import ask_network
from megatron_papo.preflight.shared_memory import warnings_of_shared_memory
from megatron_papo.text.untrusted import as_text

_PACKAGES = ("torch", "megatron.core", "transformers", "datasets", "safetensors", "PIL", "pydantic", "yaml", "rich")
"""What every verb imports; `papo doctor` says more of them."""


@dataclass(frozen=True)
class CheckResult:
    """The outcome of a check, a line a fault or warning; `summary` is empty where there is a fault."""

    faults: tuple[str, ...]
    warnings: tuple[str, ...]
    summary: str


def check_everything(verb: str, config: Config, num_ranks: int) -> CheckResult:
    """Checks a verb on `num_ranks` ranks of the whole run, from this machine."""
    packages = packages_are_here(config)
    shape, faults = _shape(config)
    faults += faults_of_layout(verb, config, shape, num_ranks)
    faults += [fault] if shape is not None and (fault := fault_of_processor(config, shape)) else []
    faults += [*faults_of_model_files(verb, config), *faults_of_inputs(verb, config, packages)]
    faults += [*(_packages(verb, config) if packages else ()), *_folder(verb, config, shape)]
    found = [] if faults else ask_network(verb, config, _data_sets(verb, config))
    faults += [reply.text for reply in found if reply.is_fault]
    if faults:
        return CheckResult(tuple(dict.fromkeys(faults)), (), "")
    trainer = num_ranks - num_engine_ranks(verb, config)
    warnings = (*config.warnings(), *warnings_of_layout(config, shape, trainer), *(reply.text for reply in found))
    if "SLURM_STEP_ID" in os.environ and config.cluster.gpus_per_node > 1:  # on a machine of the job
        warnings += tuple(warnings_of_shared_memory())
    later = "" if packages else "; the job's first step looks for packages in the image"
    return CheckResult((), warnings, summary(verb, config, shape, num_ranks) + later)


def packages_are_here(config: Config) -> bool:
    """Whether the ranks run in the environment of this process, whose packages can be looked for: a login node does not
    see into the container that `cluster` names, a job's step runs in it."""
    return config.cluster.image is None or "SLURM_STEP_ID" in os.environ


def check(verb: str, config: Config, num_ranks: int, as_json: bool = False) -> int:
    """Prints what is wrong and returns 2, or one line of what will run and returns 0; `as_json` prints the resolved
    settings on standard output and everything else on standard error."""
    checked = check_everything(verb, config, num_ranks)
    for line in checked.faults:
        print(f"papo: error: {as_text(line)}", file=sys.stderr)
    if checked.faults:
        return 2
    for line in checked.warnings:
        print(f"papo: warning: {as_text(line)}", file=sys.stderr)
    print(f"papo: check: {checked.summary}", file=sys.stderr if as_json else sys.stdout)
    if as_json:
        print(json.dumps(plain_tree(config)))
    return 0


def summary(verb: str, config: Config, shape: ModelShape | None, num_ranks: int) -> str:
    """Ranks and layout of `num_ranks` ranks, those of engines among them; of a run on GPUs the fullest stage; what a
    verb that trains leaves on the disk."""
    engines = num_engine_ranks(verb, config)
    trainer = num_ranks - engines
    tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
    data = data_ranks(config.parallel, trainer)
    parts = [f"{trainer} rank{'s' * (trainer > 1)} (tensor {tensor} x pipeline {pipeline} x data {data})"]
    if shape is not None and config.cluster.gpus_per_node:
        parts += memory_in_words(config, shape, trainer)
    if shape is not None and verb in ("train", "sft"):
        parts.append(disk_need(verb, config, shape).in_words())
    length = {"train": config.train, "sft": config.sft}.get(verb)
    if length is not None and length.epochs:
        most = f", {length.steps} at most" if length.steps else ""
        parts.append(f"steps: as many as {length.epochs:g} epochs take, known once the data is read{most}")
    parts += [f"beside {engines} rank{'s' * (engines > 1)} of engines"] if engines else []
    return ", ".join(parts)


def memory_in_words(config: Config, shape: ModelShape, num_ranks: int) -> list[str]:
    """One part of the summary, what the trainer's fullest stage holds; none of a GPU of which nothing is known."""
    has = gpu_bytes(config)
    if has is None:
        return []
    stages = stage_memory(config, shape, num_ranks)
    fullest = max(stages, key=lambda stage: stage.training)
    where = f" on stage {fullest.stage}" if len(stages) > 1 else ""
    return [
        f"{fullest.counted / GIB:.1f} of {has / GIB:.1f} GiB a GPU{where} ({fullest.parts()}) and about "
        f"{fullest.activations / GIB:.1f} of activations ({full_rows.in_words(config)})"
    ]


def shape_of(config: Config) -> ModelShape | None:
    """The shape of the model in the folder that the settings name; None without one. Raises ValueError for one that
    cannot be read."""
    folder = model_folder_or_none(config)
    return None if folder is None else ModelShape.from_folder(folder)


def _shape(config: Config) -> tuple[ModelShape | None, list[str]]:
    if missing := fault_of_missing_model(config):
        return None, [missing]
    try:
        return shape_of(config), []
    except (OSError, ValueError) as error:
        return None, [f"model.path: {error}"]


def _packages(verb: str, config: Config) -> Iterator[str]:
    """A fault for each package that is not installed; they are looked for, not imported. vLLM is looked for by
    preflight/inputs.py, which names the setting that needs it."""
    wanted = list(_PACKAGES)
    if verb in ("train", "sft"):
        wanted += ["tensorboard"] if config.observe.tensorboard else []
        wanted += ["wandb"] if config.observe.wandb != "off" else []
    if verb in ("train", "eval") and config.reward.function is None and config.reward.accuracy == "math":
        wanted.append("math_verify")
    for name in wanted:
        if find_module(name) is None:
            yield f"package {name}: is not installed in {sys.prefix}"


def _folder(verb: str, config: Config, shape: ModelShape | None) -> Iterator[str]:
    """Faults of the run folder: whether the run can write there, and whether all that stands in it has room."""
    faults = fault_of_run_dir(config)
    yield from faults
    if faults or verb not in ("train", "sft") or shape is None:
        return
    yield from faults_of_disk(verb, config, shape)


def _data_sets(verb: str, config: Config) -> dict[str, str]:
    """Key of the settings -> the path or name of a data set that the verb reads."""
    written = {"train": config.data.train, "eval": config.data.eval}
    return {
        source_key(which, written[which], place): source.path
        for which in READS[verb]
        for place, source in enumerate(source_entries(written[which]))
        if source.path is not None
    }
