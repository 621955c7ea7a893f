"""`papo check`: everything that can be known before a rank starts, a line a fault.

The inputs (preflight/inputs.py), the layout with ranks, shape and memory (preflight/layout_faults.py), the packages
that the verb imports, and the run folder with room for a checkpoint. A cluster job runs it once, on its first node,
before its ranks. Leaves out what only the ranks see: the data's rows, the network, whether activations fit. Imports no
torch.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_papo.config import Config, plain_tree
from megatron_papo.config.derived import model_folder_or_none
from megatron_papo.costs.memory import GIB, checkpoint_bytes, gpu_bytes, stage_memory
from megatron_papo.distributed.rank_arithmetic import data_ranks
from megatron_papo.model.shape import ModelShape
from megatron_papo.preflight.inputs import fault_of_run_dir, faults_of_inputs, find_module
from megatron_papo.preflight.layout_faults import faults_of_layout, num_engine_ranks, warnings_of_layout
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
    faults += [*faults_of_inputs(verb, config, packages), *(_packages(verb, config) if packages else ())]
    faults += _folder(verb, config, shape)
    if faults:
        return CheckResult(tuple(dict.fromkeys(faults)), (), "")
    num_engines = num_engine_ranks(verb, config)
    trainer = num_ranks - num_engines
    warnings = (*config.warnings(), *warnings_of_layout(config, shape, trainer))
    if "SLURM_STEP_ID" in os.environ and config.cluster.gpus_per_node > 1:  # on a machine of the job
        warnings += tuple(warnings_of_shared_memory())
    beside = f", beside {num_engines} rank{'s' * (num_engines > 1)} of engines" if num_engines else ""
    later = "" if packages else "; the job's first step looks for packages in the image"
    length = config.sft if verb == "sft" else config.train
    later += f", steps: as many as {length.epochs:g} epochs take, known once the data is read" if length.epochs else ""
    return CheckResult((), warnings, summary(config, shape, trainer) + beside + later)


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


def summary(config: Config, shape: ModelShape | None, num_ranks: int) -> str:
    """Ranks and layout; of a run on GPUs the fullest stage and the size of a checkpoint."""
    tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
    data = data_ranks(config.parallel, num_ranks)
    text = f"{num_ranks} rank{'s' * (num_ranks > 1)} (tensor {tensor} x pipeline {pipeline} x data {data})"
    if shape is None:
        return text
    has = gpu_bytes(config)
    if config.cluster.gpus_per_node and has is not None:
        fullest = max(stage_memory(config, shape, num_ranks), key=lambda stage: stage.total)
        text += (
            f", {fullest.counted / GIB:.1f} of {has / GIB:.1f} GiB a GPU ({fullest.parts()}) and about "
            f"{fullest.activations / GIB:.1f} of activations"
        )
    return f"{text}, a checkpoint of {_gib(checkpoint_bytes(config, shape))}"


def shape_of(config: Config) -> ModelShape | None:
    """The shape of the model in the folder that the settings name; None without one. Raises ValueError for one that
    cannot be read."""
    folder = model_folder_or_none(config)
    return None if folder is None else ModelShape.from_folder(folder)


def _shape(config: Config) -> tuple[ModelShape | None, list[str]]:
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
    """Faults of the run folder: whether the run can write there, and whether a checkpoint has room on the disk that the
    folder will lie on."""
    faults = fault_of_run_dir(config)
    yield from faults
    if faults or verb not in ("train", "sft") or shape is None:
        return
    standing = next(folder for folder in (config.run.dir, *config.run.dir.absolute().parents) if folder.exists())
    needed, free = checkpoint_bytes(config, shape), shutil.disk_usage(standing).free
    if needed > free:
        yield f"run.dir: {config.run.dir}: one checkpoint takes {_gib(needed)}, {_gib(free)} are free on that disk"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:.1f} MiB"
