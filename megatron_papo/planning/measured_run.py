"""A run beside its plan: what the planner says of the step that was just measured, from the same accounting.

Lengths are the means of that step, so that plan and measurement are of the same work: under dynamic sampling rollouts
of all prompts that were drawn, in as many rounds, and updates of those trained on. `calibrated` fits the planner to a
run: the median over its steps of measured over planned, stage by stage.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_papo.config import Config, ConfigError, load_config
from megatron_papo.config.derived import model_folder_or_none
from megatron_papo.costs.hardware import Cluster, Gpu, gpu_of
from megatron_papo.costs.memory import GIB
from megatron_papo.costs.stages import PLANNED_STAGES
from megatron_papo.distributed.rank_arithmetic import data_ranks
from megatron_papo.files.small_files import read_records
from megatron_papo.model.shape import ModelShape, stage_layers
from megatron_papo.observe.old_names import with_new_names
from megatron_papo.planning.assumptions import Assumptions, factor_of
from megatron_papo.planning.candidates import Candidate
from megatron_papo.planning.estimate import Estimate, estimate_applied
from megatron_papo.planning.workload import Workload

_LENGTHS = ("prompt_tokens", "image_tokens", "response_tokens")


def planned(
    config: Config, shape: ModelShape, gpu: Gpu, num_ranks: int, assumed: Assumptions, record: Mapping[str, Any]
) -> Estimate:
    """The estimate of the step whose metrics `record` holds by name: the mean tokens of prompts, images and responses
    (`_LENGTHS`), and what dynamic sampling drew."""
    parallel = config.parallel
    layers = stage_layers(parallel, shape)
    config = config.model_copy(update={"parallel": parallel.model_copy(update={"pipeline_layers": list(layers)})})
    candidate = Candidate(
        parallel.tensor,
        parallel.pipeline,
        data_ranks(parallel, num_ranks),
        layers,
        config.model.recompute,
        "as set",
        config.generation.tensor,
    )
    nodes = max(1, config.cluster.nodes)
    cluster = Cluster(gpu, nodes, max(1, num_ranks // nodes))
    generated = _workload(config, shape, {name: float(record[name]) for name in _LENGTHS})
    if "sampling/prompts" not in record:
        return estimate_applied(candidate, config, shape, cluster, assumed, generated)
    rounds = float(record["sampling/rounds"])
    generated = replace(generated, prompts=max(1, round(float(record["sampling/prompts"]) / rounds)))
    trained = _workload(config, shape, {name: float(record[f"trained/{name}"]) for name in _LENGTHS})
    step, each_round = (
        estimate_applied(candidate, config, shape, cluster, assumed, work) for work in (trained, generated)
    )
    return replace(step, seconds=step.seconds | {"generate": rounds * each_round.seconds["generate"]})


def _workload(config: Config, shape: ModelShape, lengths: dict[str, float]) -> Workload:
    work = Workload.of(
        config,
        shape,
        text_tokens=round(lengths["prompt_tokens"] - lengths["image_tokens"]),
        image_tokens=round(lengths["image_tokens"]),
        response_tokens=max(1, round(lengths["response_tokens"])),
    )
    return work.with_own_shares(shape)


def step_planner(
    config: Config, shape: ModelShape, device_name: str | None, num_ranks: int
) -> Callable[[Mapping[str, float]], dict[str, float]]:
    """The function that turns the metrics of a measured step of this run into the metrics `planned/...` beside them:
    seconds by stage, the peak of the fullest GPU and the updates' MFU. It returns none for a kind of GPU that the table
    of GPUs lacks, and for a step without responses.

    `device_name`: as CUDA names the GPU, None without one. Raises ValueError for a bad file `observe.calibration`.
    """
    assumed = Assumptions.load(config.observe.calibration) if config.observe.calibration else Assumptions()
    gpu = gpu_of(device_name)

    def plan(record: Mapping[str, float]) -> dict[str, float]:
        if gpu is None or not record.get("response_tokens"):
            return {}
        step = planned(config, shape, gpu, num_ranks, assumed, record)
        values = {f"planned/time/{stage}": step.seconds[stage] for stage in PLANNED_STAGES}
        return values | {"planned/memory_gib": step.peak / GIB, "planned/mfu": step.mfu}

    return plan


def calibrated(run: Path, gpu: Gpu) -> Assumptions:
    """Assumptions with factors such that the plan of RUN's steps, on `gpu`s, takes what they took. The first step,
    which warms up, is left out where there are others. Raises ConfigError naming the file at fault."""
    config, records = _read(run)
    folder = model_folder_or_none(config)
    if folder is None:
        raise ConfigError(f"{run}/config.yaml: names no model")
    shape = ModelShape.from_folder(folder)
    ratios: dict[str, list[float]] = {stage: [] for stage in PLANNED_STAGES}
    for record in records[1:] or records:
        step = planned(config, shape, gpu, int(record["ranks"]), Assumptions(), record)
        for stage in PLANNED_STAGES:
            measured, plan = float(record.get(f"time/{stage}", 0.0)), step.seconds[stage]
            if measured > 0 and plan > 0:
                ratios[stage].append(measured / plan)
    factors = {factor_of(stage): statistics.median(values) for stage, values in ratios.items() if values}
    return replace(Assumptions(), **factors)


def _read(run: Path) -> tuple[Config, list[dict[str, Any]]]:
    lines = run / "metrics.jsonl"
    if not lines.is_file():
        raise ConfigError(f"{lines}: no metrics of a run: no such file")
    needed = ("ranks", *_LENGTHS, "time/update")
    records = [record for record in map(with_new_names, read_records(lines)) if all(name in record for name in needed)]
    if not records:
        raise ConfigError(f"{lines}: no step with {', '.join(needed)}")
    return load_config(run / "config.yaml", to_run=False), records
