"""How many ranks a command starts on this machine, and whether a machine without a GPU is meant for such a model.

With GPUs there is one rank for each of them, as `papo check` assumes of the machines of the section `cluster`; without
one, as many as hold one copy of the model. Leaves out ranks that torchrun or srun started. Imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from megatron_papo.config import Config, ConfigError
from megatron_papo.costs.memory import GIB, num_parameters, stage_memory
from megatron_papo.distributed.rank_arithmetic import data_ranks, fault_of_ranks, model_ranks, model_ranks_in_words
from megatron_papo.model.shape import ModelShape
from megatron_papo.preflight.layout_faults import num_engine_ranks

_MOST_ON_CPUS = 10**9
"""Parameters of the largest model that is trained on CPUs without `--cpu`: a step of it already takes minutes."""
_TRAINS = ("train", "sft")


def local_ranks(verb: str, config: Config, asked: int | None, num_gpus: int) -> int:
    """The number of ranks to start on a machine with `num_gpus` GPUs; `asked`: by `--ranks`. Raises ConfigError for
    what the layout cannot share out."""
    if asked is not None and num_gpus and asked > num_gpus:
        raise ConfigError(f"--ranks: {asked} ranks for {_in_words(num_gpus)}: each takes a GPU of its own")
    needed, engines = model_ranks(config.parallel), num_engine_ranks(verb, config)
    if asked is not None:
        if not engines and fault_of_ranks(config.parallel, asked):  # with engines faults_of_ranks says it
            raise ConfigError(f"--ranks: {asked} is no multiple of {model_ranks_in_words(config.parallel)}")
        return asked
    if not num_gpus:
        return needed + engines
    if fault_of_ranks(config.parallel, num_gpus - engines):
        raise ConfigError(_undivided(config, num_gpus, engines))
    return num_gpus


def _undivided(config: Config, num_gpus: int, engines: int) -> str:
    """The line for GPUs that are no whole number of copies of the model, with what may be chosen instead."""
    needed, trainer = model_ranks(config.parallel), max(num_gpus - engines, 0)
    beside = f" less {engines} for engines" if engines else ""
    fault = f"parallel: {_in_words(num_gpus)}{beside}: no multiple of {model_ranks_in_words(config.parallel)}"
    most = trainer // needed * needed
    choices = [f"--ranks {most + engines} uses {most + engines} of them"] if most else []
    others = [size for size in range(1, trainer + 1) if trainer % (size * config.parallel.pipeline) == 0]
    if others:
        choices.append(f"parallel.tensor={', '.join(map(str, others))} divides them")
    return f"{fault}: {', or '.join(choices or ['more GPUs are needed'])}"


def faults_of_cpu(verb: str, config: Config, shape: ModelShape | None, num_ranks: int) -> Iterator[str]:
    """A line where a model is too large to be meant for the CPUs of a machine that shows no GPU; `num_ranks`: of the
    trainer, all of them on this machine."""
    if shape is None:
        return
    size, needs, has = num_parameters(shape), host_bytes(verb, config, shape, num_ranks), _memory()
    what = f"model.path: {size / 1e9:.1f} billion parameters, and this machine shows no GPU"
    remedy = "`papo doctor` says what it has, CUDA_VISIBLE_DEVICES may hide its GPUs, --cpu takes its CPUs all the same"
    if verb in _TRAINS and size > _MOST_ON_CPUS:
        yield f"{what}: on CPUs a step would take minutes to hours; {remedy}"
    elif needs > has:
        yield f"{what}: {num_ranks} ranks need {needs / GIB:.1f} GiB of its memory, which is {has / GIB:.1f}; {remedy}"


def host_bytes(verb: str, config: Config, shape: ModelShape, num_ranks: int) -> int:
    """Bytes that the model takes on a machine without a GPU whose `num_ranks` ranks are the whole trainer: weights,
    and where it trains, gradients and optimizer states."""
    on_cpus = config.model.model_copy(update={"dtype": "float32"}) if config.model.dtype == "auto" else config.model
    stages = stage_memory(config.model_copy(update={"model": on_cpus}), shape, num_ranks)
    trains = verb in _TRAINS
    each = sum(stage.weights + (stage.gradients + stage.optimizer if trains else 0) for stage in stages)
    return each * config.parallel.tensor * data_ranks(config.parallel, num_ranks)


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _in_words(num_gpus: int) -> str:
    return f"this machine's {num_gpus} GPUs" if num_gpus > 1 else "this machine's one GPU"
