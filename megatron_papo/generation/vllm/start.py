"""Starting and ending a vLLM engine inside a rank of the trainer: its settings, its ranks, its shared memory, and the
protection of the trainer's own state. vLLM itself is imported only once `start` is called.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import random
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
import torch.distributed as dist

from megatron_papo.config import Config
from megatron_papo.config.derived import engine_dtype
from megatron_papo.data.processor import Processor
from megatron_papo.distributed import accelerator
from megatron_papo.distributed.exchange import gather_objects
from megatron_papo.distributed.layout import Layout
from megatron_papo.generation.vllm.versions import clear_method_caches, settings_if_known

if TYPE_CHECKING:
    from vllm import LLM

_GIB = 1024**3
_CPU_KV_CACHE_GIB = 0.5
_CPU_BATCHED_TOKENS = 4096
"""The most tokens of a forward pass without a GPU; vLLM's own default."""
_NO_SHARE = 0.01
"""The share of the GPU where the cache has a size of its own: vLLM then uses the share for nothing, but refuses to
start while less than it is free."""
_MAX_IMAGES = 64
"""The most images of a prompt; vLLM wants a bound."""
_MAX_TEMPERATURE = 2
_MOST_BIASES = 1024
"""The most biased tokens of a request in vLLM's model runner V2 (vllm/v1/worker/gpu/sample/logit_bias.py of 0.26 to
0.32), which vLLM takes on a GPU; its older runner takes any number."""
_SHM = "megatron_papo_"
"""How the names of our shared-memory segments begin; the process id of the rank that leads the engine follows."""


def check(config: Config, layout: Layout) -> None:
    """Raises ValueError for what vLLM cannot do in the ranks of `layout`, before it is imported."""
    check_settings(config)
    if layout.world_size % config.generation.tensor:
        raise ValueError(f"generation.tensor={config.generation.tensor} does not divide the {layout.world_size} ranks")


def check_settings(config: Config) -> None:
    """Raises ValueError for what vLLM cannot do, wherever its ranks are."""
    if importlib.util.find_spec("vllm") is None:
        raise ValueError("generation.engine=vllm: vLLM is not installed; run: make gpu-venv (without a GPU: make vllm)")
    if config.generation.quantization != "none" and not accelerator.has_gpu():
        raise ValueError(f"generation.quantization={config.generation.quantization}: vLLM needs a GPU for it")
    for key, value in (("generation", config.generation.temperature), ("eval", config.eval.temperature)):
        if value > _MAX_TEMPERATURE:
            raise ValueError(f"{key}.temperature={value}: vLLM takes 0 to {_MAX_TEMPERATURE}")


def check_bans(num_banned: int, llm: LLM) -> None:
    """Raises ValueError for more banned ids than the engine takes: it would fail at the first request."""
    runner_v2 = accelerator.has_gpu() and llm.llm_engine.vllm_config.use_v2_model_runner
    if runner_v2 and num_banned > _MOST_BIASES:
        raise ValueError(
            f"model.path: {num_banned} ids of the vocabulary are none of the tokenizer's words and are banned in every "
            f"request; vLLM's model runner V2 takes {_MOST_BIASES}, the older any number: VLLM_USE_V2_MODEL_RUNNER=0"
        )


def start(config: Config, processor: Processor, layout: Layout, shm_name: str, max_model_len: int) -> LLM:
    """An engine with dummy weights on the ranks of `layout`; the trainer's random generators are left as they are.

    `shm_name`: of its shared memory (`shm_name_of`); `max_model_len`: the most tokens of a prompt with its response.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # vLLM has no other switch for these three
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")  # it does not heed a request's seed, and needs nvcc
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING" if accelerator.has_gpu() else "ERROR")
    with trainer_state_kept():
        from vllm import LLM
        from vllm.config import WeightTransferConfig

        from megatron_papo.generation.vllm.weight_transfer import BACKEND, register

        register()
        generation, on_gpu = config.generation, accelerator.has_gpu()
        kv_cache_gib = generation.kv_cache_gib or (None if on_gpu else _CPU_KV_CACHE_GIB)
        return LLM(
            model=str(processor.folder),
            trust_remote_code=False,
            load_format="dummy",
            dtype=accelerator.parameter_dtype(engine_dtype(config)),
            tensor_parallel_size=generation.tensor,
            distributed_executor_backend=_executor(layout, shm_name),
            weight_transfer_config=WeightTransferConfig(backend=BACKEND),
            max_model_len=max_model_len,
            **({} if on_gpu else _whole_prompts(max_model_len)),
            kv_cache_memory_bytes=None if kv_cache_gib is None else int(kv_cache_gib * _GIB),
            gpu_memory_utilization=generation.gpu_memory_fraction if kv_cache_gib is None else _NO_SHARE,
            enforce_eager=generation.enforce_eager or not on_gpu,
            enable_prefix_caching=generation.prefix_caching,
            enable_sleep_mode=sleeps(config),
            quantization=None if generation.quantization == "none" else generation.quantization,
            limit_mm_per_prompt={"image": _MAX_IMAGES, "video": 0},
            mm_processor_kwargs={"size": dict(zip(("shortest_edge", "longest_edge"), processor.pixel_bounds))},
            logprobs_mode="processed_logprobs",
            generation_config="vllm",  # none of the folder's sampling defaults
            disable_log_stats=True,
            seed=0,  # every request has its own
            **settings_if_known(),
        )


def _whole_prompts(max_model_len: int) -> dict[str, Any]:
    """Settings by which a prompt is read in one piece, for machines without a GPU.

    After each piece, vLLM sets the request's random generator back, which torch's generator on the CPU cannot do
    (`RuntimeError: CPU Generator does not use offset`).
    """
    return {"enable_chunked_prefill": False, "max_num_batched_tokens": max(_CPU_BATCHED_TOKENS, max_model_len)}


def end(llm: LLM, cached_methods: Iterable[str]) -> None:
    """Ends an engine and vLLM's own process groups; empties the caches of `cached_methods`, which keep its model.

    vLLM alone would end the trainer's world too. Without a GPU, whose memory garbage collection gives back, it would
    also look twice for garbage among all objects of the process, which takes seconds.
    """
    from vllm.distributed import parallel_state

    originals = parallel_state.destroy_distributed_environment, gc.collect
    parallel_state.destroy_distributed_environment = _forget_world
    if not accelerator.has_gpu():
        gc.collect = _collect_nothing
    try:
        llm.llm_engine.engine_core.shutdown()
        clear_method_caches(cached_methods)
    finally:
        parallel_state.destroy_distributed_environment, gc.collect = originals


def _collect_nothing(generation: int = 2) -> int:
    return 0


def _forget_world() -> None:
    """Makes vLLM forget that it uses the world, and ends its subgroups over all ranks."""
    from vllm.distributed import parallel_state

    if parallel_state._WORLD is not None:
        parallel_state._WORLD.destroy()
    parallel_state._WORLD = parallel_state._NODE_COUNT = None


def sleeps(config: Config) -> bool:
    """Whether the engine gives its memory back between rollouts: where it shares a GPU with the trainer."""
    generation = config.generation
    return generation.sleep and generation.placement == "colocated" and accelerator.has_gpu()


def _executor(layout: Layout, shm_name: str) -> type:
    """vLLM's external launcher, which takes its rank from `layout` instead of the environment."""
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

    local_rank = torch.cuda.current_device() if accelerator.has_gpu() else 0

    class TrainerLaunched(ExecutorWithExternalLauncher):
        def _distributed_args(self) -> tuple[str, int, int]:
            return f"env://:{shm_name}", layout.rank, local_rank  # the tail names the shared memory

    return TrainerLaunched


def shm_name_of(engine_group: dist.ProcessGroup | None) -> str:
    """A name for the engine's shared memory on the CPU, the same on all its ranks. A collective of `engine_group`.

    vLLM's own name is the same for all runs of a machine: two runs, or one run and the remains of a killed one, would
    collide.
    """
    name = f"{_SHM}{os.getpid()}_{secrets.token_hex(4)}"
    return name if engine_group is None else gather_objects(name, engine_group)[0]


def remove_leftovers() -> None:
    """Unlinks shared memory of engines of this package whose leading process is gone."""
    for file in Path("/dev/shm").glob(f"*{_SHM}*"):
        pid = file.name.partition(_SHM)[2].partition("_")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            file.unlink(missing_ok=True)


def engine_group_of(layout: Layout, size: int) -> dist.ProcessGroup | None:
    """The group in which the ranks of this rank's engine exchange objects; None when the engine has this rank only.

    A collective of all ranks.
    """
    if size == 1:
        return None
    groups = [
        dist.new_group(list(range(first, first + size)), backend="gloo") for first in range(0, layout.world_size, size)
    ]
    return groups[layout.rank // size]


@contextmanager
def trainer_state_kept() -> Iterator[None]:
    """Restores the trainer's state at the end: vLLM seeds every random generator of the process and replaces
    `torch.set_num_threads`."""
    state, numpy_state, set_num_threads, threads = (
        random.getstate(), numpy.random.get_state(), torch.set_num_threads, torch.get_num_threads()
    )  # fmt: skip
    try:
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if accelerator.has_gpu() else []):
            yield
    finally:
        random.setstate(state)
        numpy.random.set_state(numpy_state)
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)
