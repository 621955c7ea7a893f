"""The two sides of an update on one device: the package's own, and PAPO in plain PyTorch on a transformers model."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from megatron_papo.accelerator import adapt_megatron, device, has_gpu, parameter_dtype, seed_all
from megatron_papo.accounting import Meter
from megatron_papo.config import Config
from megatron_papo.data.processor import load_processor
from megatron_papo.model.policy import build_policy
from megatron_papo.model.shape import ModelShape
from megatron_papo.observe.watchdog import StageClock
from megatron_papo.optim import build_optimizer, wrap_policy
from megatron_papo.parallel import initialize, own_rank, shutdown
from megatron_papo.run import Run
from tools.benchmarks.gpu.folder import draw_into, drawn_tensors
from tools.benchmarks.gpu.rows import Options
from tools.benchmarks.ours import Key, Ours, settings
from tools.benchmarks.plain_papo import PlainPapo
from tools.benchmarks.rollouts import Workload

PERCEPTION = ("PAPO frozen", "PAPO joint")
_PLAIN_SEQUENCES = {"3b": 4, "tiny": 2}
"""Rollouts of a forward: at 151,936 words four times 512 logits in fp32 and their gradients take 4 GB."""
_PLAIN_BYTES = 8
"""A parameter, with gradient and two moments, all in bfloat16."""
_OUR_BYTES = 18
"""A parameter in bfloat16, its gradient, master copy and two moments in fp32."""
_ROOM = 0.7
"""Of a GPU, for states; the rest is for activations."""


def workload(options: Options) -> Workload:
    """What an update trains on: 4 prompts of 1,500 tokens with 8 responses of 512 each, or little."""
    if options.shape == "tiny":
        return Workload(96, 16, num_prompts=2, group_size=4)
    return Workload(1500, 128, num_prompts=2) if options.quick else Workload(1500, 512)


def row_budget(work: Workload) -> int:
    """Tokens of a micro-batch: one group in both views, with room to spare."""
    tokens = 2 * (work.prompt_tokens + work.group_size * work.response_tokens)
    return -(-tokens // 1024) * 1024


def our_settings(folder: Path, kind: str, work: Workload, **more: Any) -> Config:
    own: dict[str, Any] = {"model__dtype": "auto", "train__tokens_per_micro_batch": row_budget(work)}
    own |= {"data__max_prompt_tokens": work.prompt_tokens, "generation__max_response_tokens": work.response_tokens}
    own |= {"parallel__distributed_optimizer": True, "train__group_size": work.group_size}
    return settings(folder, kind, **(own | more))


@contextmanager
def open_policy(config: Config) -> Iterator[Run]:
    """As `megatron_papo.run.open_run`, with weights drawn on the device; ends the process groups afterwards."""
    assert config.model.path is not None
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    adapt_megatron()
    with ExitStack() as stack:
        clock = stack.enter_context(StageClock(config.run, own_rank(), console=False))
        layout = initialize(config.parallel)
        stack.callback(shutdown)
        seed_all(config.run.seed)
        shape = ModelShape.from_folder(config.model.path)
        processor = load_processor(config.model.path, config.data)
        policy = build_policy(config, shape)
        draw_into(policy, shape)
        yield Run(config, layout, shape, processor, clock, Meter(shape), policy)


@contextmanager
def open_ours(folder: Path, work: Workload, **more: Any) -> Iterator[Ours]:
    """Both kinds of `PERCEPTION` on one policy and one optimizer; `more`: settings, with `__` for the dot."""
    configs = {kind: our_settings(folder, kind, work, **more) for kind in PERCEPTION}
    with open_policy(configs["PAPO frozen"]) as run:
        optimizer = build_optimizer(wrap_policy(run.policy, run.config), run.config, num_updates=1000)
        yield Ours(run, optimizer, configs)


def open_plain(folder: Path, options: Options) -> PlainPapo:
    """The transformers model with the same weights, its attention the fastest that is installed; Adam in its dtype."""
    shape, dtype = ModelShape.from_folder(folder / "model"), parameter_dtype("auto")
    config = Qwen2_5_VLConfig.from_pretrained(folder / "model", local_files_only=True)
    with torch.device(device()):
        make = Qwen2_5_VLForConditionalGeneration._from_config
        model = make(config, dtype=dtype, attn_implementation=plain_attention())
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in drawn_tensors(shape, dtype):
            own[name].copy_(tensor)
    return PlainPapo(model, _PLAIN_SEQUENCES[options.shape])


def plain_attention() -> str:
    flash = has_gpu() and importlib.util.find_spec("flash_attn") is not None
    return "flash_attention_2" if flash else "sdpa"


def fits_both(ours: Ours) -> bool:
    """Whether the device holds both sides' states at a time."""
    if not has_gpu():
        return True
    num_parameters = sum(parameter.numel() for parameter in ours.run.policy.parameters())
    return num_parameters * (_OUR_BYTES + _PLAIN_BYTES) < _ROOM * torch.cuda.mem_get_info()[1]


def mean_gap(ours: Mapping[Key, Tensor], theirs: Mapping[Key, Tensor]) -> float:
    """Of two sides' log-probs of the same rollouts, mean absolute difference in nats."""
    return float(torch.cat([(ours[key].cpu() - theirs[key].cpu()).abs() for key in ours]).mean())
