"""Generated tokens a second of vLLM through VllmGenerator, with and without prefix caching.

Groups of eight rollouts, each round of other prompts, so that nothing but a group's own prompt can be cached; weights
are drawn on the device, there is no trainer. One engine at a time, each the same rounds. The share of prompt tokens
that came from the cache is the engine's own count; seven eighths of whole blocks is the most it can be.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.gpu.clock import clock
from benchmarks.gpu.folder import drawn_tensors, model_folder
from benchmarks.gpu.policy import our_settings
from benchmarks.gpu.rows import GpuRow, Options, attempt, compared, not_measured, reason_of, release, show_failure
from benchmarks.rollouts import Workload, make_groups
from megatron_papo.config import Config
from megatron_papo.data.processor import load_processor
from megatron_papo.distributed.accelerator import adapt_megatron, parameter_dtype
from megatron_papo.distributed.layout import initialize, shutdown
from megatron_papo.generation import Sampling, build_generator
from megatron_papo.model.shape import ModelShape

_TINY_KV_CACHE_GIB = 0.05


@dataclass(frozen=True)
class Figures:
    tokens_per_s: float
    """Median of the rounds."""
    cached: float
    """Share of the prompts' tokens."""


def run(options: Options) -> Iterator[GpuRow]:
    if importlib.util.find_spec("vllm") is None:
        yield not_measured("rollouts", "vLLM is not installed")
        return
    with model_folder(options.shape) as folder:
        yield from attempt("rollouts", lambda: _rows(folder, options))


def rollout_workload(options: Options) -> Workload:
    if options.tiny:
        return Workload(300, 8, num_prompts=2)
    return Workload(1500, 128, num_prompts=4) if options.quick else Workload(1500, 512, num_prompts=16)


def engine_settings(folder: Path, options: Options, **more: object) -> Config:
    kv_cache = _TINY_KV_CACHE_GIB if options.tiny else "null"
    engine: dict[str, object] = {"generation__engine": "vllm", "generation__kv_cache_gib": kv_cache}
    return our_settings(folder, "PAPO frozen", rollout_workload(options), **(engine | more))


def _rows(folder: Path, options: Options) -> Iterator[GpuRow]:
    on, work = _measure(folder, options, prefix_caching=True), rollout_workload(options)
    what = f"{work.num_prompts} x {work.group_size} rollouts, {work.prompt_tokens} + {work.response_tokens} tokens"
    yield GpuRow(f"{what}: with prefix caching", on.tokens_per_s, "tokens/s")
    yield GpuRow(f"{what}: engine/prefix_cached", on.cached, "of prompt tokens")
    try:
        off = _measure(folder, options, prefix_caching=False)
    except Exception as error:  # of the second engine: the first stands without it
        show_failure(error)
        yield not_measured(f"{what}: without prefix caching", reason_of(error))
        return
    yield compared(f"{what}: with prefix caching / without", on.tokens_per_s, off.tokens_per_s, "tokens/s")
    yield GpuRow(f"{what}: engine/prefix_cached, with / without", on.cached, "of prompt tokens", off.cached)


def _measure(folder: Path, options: Options, prefix_caching: bool) -> Figures:
    config = engine_settings(folder, options, generation__prefix_caching=prefix_caching, generation__sleep=False)
    work, shape = rollout_workload(options), ModelShape.from_folder(folder / "model")
    adapt_megatron()
    layout = initialize(config.parallel)
    processor = load_processor(folder / "model", config.data)
    engine = build_generator(config, processor, layout)
    engine.load_weights(drawn_tensors(shape, parameter_dtype("auto")), policy_version=0)
    sampling = Sampling(
        group_size=work.group_size, temperature=1.0, top_p=1.0, top_k=0, seed=0,
        max_response_tokens=work.response_tokens,
    )  # fmt: skip
    rates = []
    for index in range(options.rounds + 1):  # the first warms up
        groups = make_groups(replace(work, group_size=1), processor, seed=index)
        prompts = [replace(group.prompt, id=f"{index}:{group.prompt.id}") for group in groups]
        if index == 1:
            engine.take_metrics()
        before = clock()
        answered = engine.generate(prompts, sampling)
        taken = clock() - before
        rates.append(sum(len(r.response_ids) for group in answered for r in group.rollouts) / taken)
    cached, read = engine.take_metrics()["engine/prefix_cached"]
    engine.close()
    shutdown()
    del engine
    release()
    return Figures(statistics.median(rates[1:]), cached / read)
