"""Our side of an update on one device: a policy with weights drawn there, its optimizer, and the batch."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.folder import draw_into
from benchmarks.gpu.rows import Options
from benchmarks.ours import Key, Ours, settings
from benchmarks.rollouts import Workload, make_groups
from megatron_papo.config import Config
from megatron_papo.costs.flops import Meter
from megatron_papo.data.processor import load_processor
from megatron_papo.distributed.accelerator import adapt_megatron, seed_all
from megatron_papo.distributed.layout import initialize, own_rank, shutdown
from megatron_papo.model.policy import build_policy
from megatron_papo.model.shape import ModelShape
from megatron_papo.observe.clock import StageClock
from megatron_papo.optimization.optimizer import build_optimizer, wrap_policy
from megatron_papo.training.session import Run
from megatron_papo.types import Group

PERCEPTION = ("PAPO frozen", "PAPO joint")


def workload(options: Options) -> Workload:
    """What an update trains on: 4 prompts of 1,500 tokens with 8 responses of 512 each, or little."""
    if options.tiny:
        return Workload(96, 16, num_prompts=2, group_size=4)
    return Workload(1500, 128, num_prompts=2) if options.quick else Workload(1500, 512)


def row_budget(work: Workload) -> int:
    """Tokens of a micro-batch: one group in both views, with room to spare."""
    tokens = 2 * (work.prompt_tokens + work.group_size * work.response_tokens)
    return -(-tokens // 1024) * 1024


def batch(folder: Path, options: Options) -> list[Group]:
    """What an update trains on. Made before other processes are forked it also spares each of them the import of what
    reads a processor."""
    work = workload(options)
    return make_groups(work, load_processor(folder / "model", our_settings(folder, PERCEPTION[0], work).data))


def our_settings(folder: Path, kind: str, work: Workload, **more: Any) -> Config:
    own: dict[str, Any] = {"model__dtype": "auto", "train__tokens_per_micro_batch": row_budget(work)}
    own |= {"data__max_prompt_tokens": work.prompt_tokens, "generation__max_response_tokens": work.response_tokens}
    own |= {"parallel__distributed_optimizer": True, "train__group_size": work.group_size}
    return settings(folder, kind, **(own | more))


@contextmanager
def open_policy(config: Config) -> Iterator[Run]:
    """A context like `megatron_papo.training.session.open_run`, with weights drawn on the device; ends the process
    groups afterwards."""
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


def mean_gap(ours: Mapping[Key, Tensor], theirs: Mapping[Key, Tensor]) -> float:
    """Mean absolute difference, in nats, of two sides' log-probs of the same rollouts."""
    return float(torch.cat([(ours[key].cpu() - theirs[key].cpu()).abs() for key in ours]).mean())


def on_host(logprobs: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
    """The log-probs on the host, where another process can read them."""
    return {key: values.cpu() for key, values in logprobs.items()}
