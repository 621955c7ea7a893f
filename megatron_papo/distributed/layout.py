"""Process groups from the settings, and this rank's place in them.

Ranks are laid out by Megatron-Core's `parallel_state`: tensor fastest, then data, then pipeline. Exchanges of
values between ranks are in exchange.py. On a machine without a GPU call `accelerator.adapt_megatron` first.
"""

from __future__ import annotations

import datetime
import itertools
import math
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_papo.config import ParallelConfig
from megatron_papo.distributed.rank_arithmetic import data_ranks, fault_of_ranks
from megatron_papo.distributed.rendezvous import world_store


@dataclass(frozen=True)
class Layout:
    """This rank's place in each group, and the groups it belongs to."""

    rank: int
    world_size: int
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    data_rank: int
    data_size: int
    tensor_group: dist.ProcessGroup
    pipeline_group: dist.ProcessGroup
    data_group: dist.ProcessGroup
    model_group: dist.ProcessGroup
    """All ranks that together hold one copy of the model: tensor x pipeline."""

    @property
    def model_size(self) -> int:
        """Ranks that together hold one copy of the model: tensor x pipeline."""
        return self.tensor_size * self.pipeline_size

    @property
    def model_rank(self) -> int:
        """This rank's rank in `model_group`; the tensor rank changes fastest."""
        return self.pipeline_rank * self.tensor_size + self.tensor_rank

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline_size - 1


_layout: Layout | None = None
_worlds = itertools.count()
"""Numbers the worlds of this process, so that a second world reads nothing of the first in the store."""


def initialize(parallel: ParallelConfig, num_engine_ranks: int = 0) -> Layout:
    """Starts torch.distributed (from RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) and Megatron's groups.

    A process that was started without these variables becomes rank 0 of 1. A process group that exists already is
    used. The last `num_engine_ranks` of those that were started belong to separate engines and not to this world.
    Raises ValueError when the world does not divide by tensor x pipeline.
    """
    global _layout
    if not dist.is_initialized():
        _start_process_group(parallel.timeout_s, num_engine_ranks)
    world_size = dist.get_world_size()
    if fault := fault_of_ranks(parallel, world_size):
        raise ValueError(fault)
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        distributed_timeout_minutes=math.ceil(parallel.timeout_s / 60),
    )
    _layout = Layout(
        rank=dist.get_rank(),
        world_size=world_size,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel.tensor,
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=parallel.pipeline,
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=data_ranks(parallel, world_size),
        tensor_group=parallel_state.get_tensor_model_parallel_group(),
        pipeline_group=parallel_state.get_pipeline_model_parallel_group(),
        data_group=parallel_state.get_data_parallel_group(),
        model_group=parallel_state.get_model_parallel_group(),
    )
    return _layout


def layout() -> Layout:
    """The layout that `initialize` made."""
    assert _layout is not None, "initialize() comes first"
    return _layout


def own_rank() -> int:
    """This process's rank in the world, before `initialize` too."""
    return int(os.environ.get("RANK", "0"))


def place_among_engines(num_engine_ranks: int) -> int | None:
    """This process's place among the last `num_engine_ranks` of those that were started; None on the trainer's."""
    first = int(os.environ.get("WORLD_SIZE", "1")) - num_engine_ranks
    return own_rank() - first if num_engine_ranks and own_rank() >= first else None


def shutdown() -> None:
    """Ends the process groups; harmless when there are none."""
    global _layout
    if dist.is_initialized():
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    _layout = None


def world_group() -> dist.ProcessGroup:
    """All ranks of the world."""
    group = dist.group.WORLD
    assert group is not None
    return group


def tensor_layout(rank: int, size: int) -> Layout:
    """The layout of a world whose `size` ranks hold one model by tensor parallelism alone, as an engine's ranks do.

    A collective of all ranks of the world, which has been started; Megatron's groups are not made.
    """
    world = world_group()
    single = [dist.new_group([each]) for each in range(size)][rank]
    return Layout(
        rank=rank, world_size=size, tensor_rank=rank, tensor_size=size, pipeline_rank=0, pipeline_size=1, data_rank=0,
        data_size=1, tensor_group=world, pipeline_group=single, data_group=single, model_group=world,
    )  # fmt: skip


def _start_process_group(timeout_s: float, num_engine_ranks: int) -> None:
    timeout = datetime.timedelta(seconds=timeout_s)
    num_ranks = int(os.environ.get("WORLD_SIZE", "1")) - num_engine_ranks
    if num_ranks < 1:
        raise ValueError(
            f"generation.placement=separate: {num_ranks + num_engine_ranks} ranks, generation.engines x "
            f"generation.tensor = {num_engine_ranks} of them for engines, leave none to train"
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    own = dist.PrefixStore(f"trainer_{next(_worlds)}", world_store(timeout_s))
    dist.init_process_group(backend, store=own, rank=own_rank(), world_size=num_ranks, timeout=timeout)
