"""The weight hand-over from a policy to vLLM beside it, by the size of its buckets; and the engine's sleep.

One rank: the policy's own tensors, put together to Hugging Face's, into the engine's loader; exchanges between ranks
are not in it (`tools/benchmark.py handover` has those). `generation.bucket_mib=1` is about one parameter at a time.
Seconds of sleeping and waking, and what of the GPU's memory comes back, need a GPU.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks.gpu.clock import clock, in_turns
from benchmarks.gpu.folder import model_folder
from benchmarks.gpu.policy import open_policy
from benchmarks.gpu.rollouts import engine_settings
from benchmarks.gpu.rows import NEEDS_GPU, GpuRow, Options, attempt, compared, not_measured
from megatron_papo.config import Config
from megatron_papo.distributed.accelerator import has_gpu
from megatron_papo.generation.vllm.vllm_engine import VllmGenerator
from megatron_papo.training.rollouts import give_weights
from megatron_papo.training.session import Run
from megatron_papo.weights.transfer import hf_tensors

BUCKETS_MIB = (1, 64, 256)
_SLEEP = "seconds to sleep; to wake; memory given back"


def run(options: Options) -> Iterator[GpuRow]:
    if importlib.util.find_spec("vllm") is None:
        yield not_measured("hand-over", "vLLM is not installed")
        return
    with model_folder(options.shape) as folder:
        yield from attempt("hand-over", lambda: _rows(folder, options))


def _rows(folder: Path, options: Options) -> Iterator[GpuRow]:
    with open_policy(engine_settings(folder, options)) as run:
        engine = VllmGenerator(run.config, run.processor, run.layout)
        yield from _buckets(run, engine, options)
        if has_gpu():
            yield from _sleep(engine, options)
        else:
            yield not_measured(_SLEEP, NEEDS_GPU)
        engine.close()


def _buckets(run: Run, engine: VllmGenerator, options: Options) -> Iterator[GpuRow]:
    num_bytes = sum(tensor.nbytes for _, tensor in hf_tensors(run.policy, run.shape))
    sides: dict[str, Callable[[], object]] = {
        f"{mib} MiB": partial(give_weights, replace(run, config=_with_buckets(run.config, mib)), engine, 0)
        for mib in BUCKETS_MIB
    }
    seconds = in_turns(sides, options.rounds, "hand-over")
    first, *others = sides
    for side in others:
        name = f"hand-over of {num_bytes / 1e9:.2f} GB, buckets of {side} / {first}"
        own, base = seconds.median(side), seconds.median(first)
        yield GpuRow(name, own, "s", base, seconds.ratio(side, first))
        yield GpuRow(name, num_bytes / 1e9 / own, "GB/s", num_bytes / 1e9 / base, 1 / seconds.ratio(side, first))


def _with_buckets(config: Config, mib: int) -> Config:
    return config.model_copy(update={"generation": config.generation.model_copy(update={"bucket_mib": mib})})


def _sleep(engine: VllmGenerator, options: Options) -> Iterator[GpuRow]:
    """Medians; the memory of the last sleep, beside what the engine had taken."""
    to_sleep, to_wake = [], []
    engine.sleeper.wake()
    for _ in range(options.rounds):
        before = clock()
        engine.sleeper.sleep()
        between = clock()
        engine.sleeper.wake()
        to_sleep.append(between - before)
        to_wake.append(clock() - between)
    yield GpuRow("sleep", statistics.median(to_sleep), "s")
    yield GpuRow("wake", statistics.median(to_wake), "s")
    freed, share = engine.sleeper.freed_bytes, _engine_bytes(engine)
    yield compared("memory that a sleep gives back / generation.gpu_memory_fraction", freed / 2**30, share, "GiB")


def _engine_bytes(engine: VllmGenerator) -> float:
    """GiB of the GPU that the engine may take."""
    import torch

    return engine.config.generation.gpu_memory_fraction * torch.cuda.mem_get_info()[1] / 2**30
