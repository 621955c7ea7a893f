"""Generation with vLLM, in the trainer's own processes: the same ranks train and serve, one after the other.

An engine spans `generation.tensor` consecutive ranks (vLLM's external launcher: each rank runs the same scheduler over
the same requests); with 1, every rank has an engine of its own. Only config, tokenizer and processor files are read
from `model.path`; weights come from the trainer. Left out: sleep mode, pipeline parallelism of the engine, adapters.
"""

from __future__ import annotations

import importlib.util
import os
import random
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import Qwen2_5_VLConfig

from megatron_papo import accelerator
from megatron_papo.config import Config
from megatron_papo.generation.base import Report, Sampling
from megatron_papo.generation.handover import checked, expected_shapes
from megatron_papo.generation.pictures import pictures
from megatron_papo.generation.shares import Answer, Job, generate_in_shares
from megatron_papo.model.shape import ModelShape
from megatron_papo.parallel import Layout, gather_objects
from megatron_papo.types import Group, Prompt

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput

    from megatron_papo.data.processor import Processor

_GIB = 1024**3
_CPU_KV_CACHE_GIB = 0.5
_MAX_IMAGES = 64
"""Of a prompt; vLLM wants a bound."""
_BAN = -100.0
"""The lowest bias vLLM takes; the probability left is below the smallest fp32 number for logits of any use."""
_SHM = "megatron_papo_"
"""Our shared-memory segments begin so, then the process id of the rank that leads the engine."""


class VllmGenerator:
    """See `Generator`. The engine starts with dummy weights; `generate` refuses until the first `load_weights`."""

    def __init__(self, config: Config, processor: Processor, layout: Layout, report: Report | None = None):
        if importlib.util.find_spec("vllm") is None:
            raise ValueError("generation.engine=vllm: vLLM is not installed; install the package's [vllm] extra")
        if layout.world_size % config.generation.tensor:
            raise ValueError(
                f"generation.tensor={config.generation.tensor} does not divide the {layout.world_size} ranks"
            )
        assert config.model.path is not None
        self.processor, self.layout, self.report = processor, layout, report
        self.shape = ModelShape.from_folder(config.model.path)
        model_config = Qwen2_5_VLConfig.from_pretrained(config.model.path, local_files_only=True)
        self.expected = expected_shapes(model_config)
        self.max_model_len = min(
            config.data.max_prompt_tokens + config.generation.max_response_tokens,
            model_config.text_config.max_position_embeddings,
        )
        self.engine_group = _engine_group(layout, config.generation.tensor)
        self.llm = _start(config, layout, self.engine_group, self.max_model_len)
        self.policy_version: int | None = None

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        if self.policy_version is None:
            raise RuntimeError("generate before the first load_weights: the generator has no weights")
        return generate_in_shares(
            prompts,
            sampling,
            self.layout,
            answer=lambda jobs: self._answer(prompts, jobs, sampling),
            decode=self.processor.decode,
            policy_version=self.policy_version,
        )

    def _answer(self, prompts: Sequence[Prompt], jobs: list[Job], sampling: Sampling) -> list[Answer]:
        """The ranks of an engine run the union of their shares together, each keeps its own answers."""
        requests = [self._request(prompts[job.prompt_index], job, sampling) for job in jobs]
        if self.engine_group is None:
            return self._run(jobs, requests, sampling)
        shares = gather_objects((jobs, requests), self.engine_group)
        every_job = [job for jobs_, _ in shares for job in jobs_]
        answers = self._run(every_job, [request for _, requests_ in shares for request in requests_], sampling)
        start = sum(len(jobs_) for jobs_, _ in shares[: dist.get_rank(self.engine_group)])
        return answers[start : start + len(jobs)]

    def _request(self, prompt: Prompt, job: Job, sampling: Sampling) -> dict[str, Any]:
        """vLLM's prompt, with one image token a picture, and the full token ids that it has to come to."""
        inputs = prompt.inputs
        if inputs.token_ids_S.numel() + sampling.max_response_tokens > self.max_model_len:
            raise ValueError(
                f"prompt {prompt.id}: {inputs.token_ids_S.numel()} tokens and a response of "
                f"{sampling.max_response_tokens} exceed the engine's {self.max_model_len}"
            )
        pixel_values_PD = inputs.pixel_values_PD
        if sampling.masked and pixel_values_PD is not None:
            pixel_values_PD = prompt.masked_pixel_values_PD
            if pixel_values_PD is None:
                raise ValueError(f"prompt {prompt.id}: masked rollouts asked for, and it has no masked view")
        full = inputs.token_ids_S.tolist()
        request = {"prompt_token_ids": _compact(inputs.token_ids_S, inputs.grid_thw_I3, self.shape), "full": full}
        if pixel_values_PD is not None:
            assert inputs.grid_thw_I3 is not None
            images = pictures(pixel_values_PD, inputs.grid_thw_I3, self.processor.image_processor)
            request["multi_modal_data"] = {"image": images}
        return request

    def _run(self, jobs: list[Job], requests: list[dict[str, Any]], sampling: Sampling) -> list[Answer]:
        prompts = [{key: value for key, value in request.items() if key != "full"} for request in requests]
        with _trainer_state_kept():
            self.llm.enqueue(prompts, [self._params(job, sampling) for job in jobs], use_tqdm=False)
            done: list[RequestOutput] = []
            while self.llm.llm_engine.has_unfinished_requests():
                done += [output for output in self.llm.llm_engine.step() if output.finished]
                if self.report is not None:
                    self.report(len(done), len(jobs))
        done.sort(key=lambda output: int(output.request_id))  # numbered as they were enqueued
        assert len(done) == len(jobs)
        for job, request, output in zip(jobs, requests, done):
            if list(output.prompt_token_ids or ()) != request["full"]:
                raise RuntimeError(f"rollout {job}: vLLM expanded the prompt to other tokens than the processor's")
        return [self._answer_of(job, output) for job, output in zip(jobs, done)]

    def _params(self, job: Job, sampling: Sampling) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            n=1,
            seed=job.seed,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_response_tokens,
            logprobs=0,  # of the sampled token alone
            logit_bias=dict.fromkeys(self.shape.banned_ids, _BAN),
            stop_token_ids=list(self.processor.eos_ids),
            detokenize=False,
        )

    def _answer_of(self, job: Job, output: RequestOutput) -> Answer:
        completion = output.outputs[0]
        ids = tuple(completion.token_ids)
        assert completion.logprobs is not None and not set(ids) & set(self.shape.banned_ids)
        logprobs = tuple(place[token].logprob for place, token in zip(completion.logprobs, ids))
        assert completion.finish_reason in ("stop", "length"), completion.finish_reason
        return Answer(job, ids, logprobs, completion.finish_reason)

    def load_weights(self, named_tensors: Iterator[tuple[str, Tensor]], policy_version: int) -> None:
        self.policy_version = None
        with _trainer_state_kept(), torch.no_grad():
            self.llm.start_weight_update()
            for name, tensor in checked(named_tensors, self.expected):
                self.llm.update_weights({"update_info": {"name": name, "tensor": tensor}})
            self.llm.finish_weight_update()
            # everything computed with the old weights: keys and values, and image features
            engine = self.llm.llm_engine
            engine.reset_mm_cache()
            engine.reset_encoder_cache()
            if not engine.reset_prefix_cache():
                raise RuntimeError("vLLM kept its prefix cache: requests are still running")
        self.policy_version = policy_version

    def close(self) -> None:
        from vllm.distributed import destroy_model_parallel

        self.llm.llm_engine.engine_core.shutdown()
        destroy_model_parallel()  # vLLM's groups alone; the trainer's live on


def _start(config: Config, layout: Layout, engine_group: dist.ProcessGroup | None, max_model_len: int) -> LLM:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # vLLM has no other switch for these three
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING" if accelerator.has_gpu() else "ERROR")
    with _trainer_state_kept():
        from vllm import LLM
        from vllm.config import WeightTransferConfig

        from megatron_papo.generation.vllm_weights import BACKEND, register

        register()
        generation, on_gpu = config.generation, accelerator.has_gpu()
        kv_cache_gib = generation.kv_cache_gib or (None if on_gpu else _CPU_KV_CACHE_GIB)
        return LLM(
            model=str(config.model.path),
            load_format="dummy",
            dtype=config.model.dtype if generation.dtype == "auto" else generation.dtype,
            tensor_parallel_size=generation.tensor,
            distributed_executor_backend=_executor(layout, engine_group),
            weight_transfer_config=WeightTransferConfig(backend=BACKEND),
            max_model_len=max_model_len,
            kv_cache_memory_bytes=None if kv_cache_gib is None else int(kv_cache_gib * _GIB),
            gpu_memory_utilization=generation.gpu_memory_fraction,
            enforce_eager=generation.enforce_eager or not on_gpu,
            limit_mm_per_prompt={"image": _MAX_IMAGES, "video": 0},
            mm_processor_kwargs={
                "size": {"shortest_edge": config.data.min_pixels, "longest_edge": config.data.max_pixels}
            },
            mm_device_do_normalize=False,  # dummy loading would fill the constants of the normalisation at random
            logprobs_mode="processed_logprobs",
            generation_config="vllm",  # none of the folder's sampling defaults
            disable_log_stats=True,
            seed=0,  # every request has its own
        )


def _executor(layout: Layout, engine_group: dist.ProcessGroup | None) -> type:
    """vLLM's external launcher, told its rank by our layout instead of by the environment.

    The tail of the address names the engine's shared memory on the CPU. vLLM's own name is the same for all runs of a
    machine, so that two runs, or one and what a killed one left behind, would collide.
    """
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

    name = f"{_SHM}{os.getpid()}_{secrets.token_hex(4)}"
    if engine_group is not None:
        name = gather_objects(name, engine_group)[0]
    _remove_leftovers()
    local_rank = torch.cuda.current_device() if accelerator.has_gpu() else 0

    class TrainerLaunched(ExecutorWithExternalLauncher):
        def _distributed_args(self) -> tuple[str, int, int]:
            return f"env://:{name}", layout.rank, local_rank

    return TrainerLaunched


def _remove_leftovers() -> None:
    """Unlinks shared memory of our own engines whose leading process is gone."""
    for file in Path("/dev/shm").glob(f"*{_SHM}*"):
        pid = file.name.partition(_SHM)[2].partition("_")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            file.unlink(missing_ok=True)


def _engine_group(layout: Layout, size: int) -> dist.ProcessGroup | None:
    """The ranks of this rank's engine, for objects; None when it is this rank alone. A collective of all ranks."""
    if size == 1:
        return None
    groups = [
        dist.new_group(list(range(first, first + size)), backend="gloo") for first in range(0, layout.world_size, size)
    ]
    return groups[layout.rank // size]


@contextmanager
def _trainer_state_kept() -> Iterator[None]:
    """vLLM seeds every generator of the process and replaces `torch.set_num_threads`; the trainer's come back."""
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


def _compact(token_ids_S: Tensor, grid_thw_I3: Tensor | None, shape: ModelShape) -> list[int]:
    """The prompt with each picture's run of image tokens cut to its first; runs that touch are told apart by size."""
    kept, ids, place = [], token_ids_S.tolist(), 0
    runs = iter([] if grid_thw_I3 is None else (grid_thw_I3.prod(dim=1) // shape.vision.merge_unit).tolist())
    while place < len(ids):
        kept.append(ids[place])
        place += next(runs) if ids[place] == shape.image_token_id else 1
    return kept
