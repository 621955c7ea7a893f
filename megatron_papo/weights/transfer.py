"""Moves a model's weights from and to Hugging Face folders, and to the engine, a few parameters at a time.

A rank reads only the bytes of its own shards. Writing and the hand-over take parameters in the same order on all ranks
of a model-parallel group (`buckets.py`). No rank ever has a second copy of the model in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from megatron_papo.distributed.agreement import fail_together
from megatron_papo.distributed.exchange import gather_objects
from megatron_papo.distributed.layout import layout, world_group
from megatron_papo.model.parameter_map import fill_shard, parameter_names, parameter_table
from megatron_papo.model.shape import ModelShape
from megatron_papo.weights.buckets import gather_bucket, make_buckets
from megatron_papo.weights.held import HeldParameter, held_parameters
from megatron_papo.weights.huggingface_folder import OpenWeights, find_weights
from megatron_papo.weights.publishing import write_folder

Progress = Callable[[int, int], None]
"""Called with the number of parameters that are done and the number of all parameters."""

BUCKET_BYTES = 64 * 2**20
"""About the number of bytes that are exchanged at a time."""


def read_hf(model: nn.Module, shape: ModelShape, folder: Path | str, progress: Progress | None = None) -> None:
    """Fills this rank's shards from a Hugging Face folder, cast to the parameters' dtype; padding becomes zero.

    Raises ValueError, on every rank alike, naming file, tensor and both shapes of what does not fit.
    """
    ranks = layout()
    fill_held(held_parameters(model, shape, ranks.tensor_size), shape, folder, ranks.tensor_rank, progress)


def fill_held(
    held: Mapping[str, HeldParameter],
    shape: ModelShape,
    folder: Path | str,
    tensor_rank: int,
    progress: Progress | None = None,
) -> None:
    """Does what `read_hf` does, for parameters that `held_parameters` has listed."""
    weights = find_weights(Path(folder), shape)
    weights.check(shape)
    weights.check_head(shape)
    with OpenWeights(weights) as opened:
        for done, part in enumerate(held.values()):
            fill_shard(part.entry, part.tensor.detach(), tensor_rank, opened.read)
            if progress:
                progress(done + 1, len(held))


@torch.no_grad()
def hf_tensors(
    model: nn.Module,
    shape: ModelShape,
    *,
    module_names: bool = False,
    bucket_bytes: int = BUCKET_BYTES,
    progress: Progress | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Pairs (Hugging Face name, full tensor) of the whole model, in one order on every rank of the model-parallel
    group.

    Every rank of the group must iterate to the end. Names are those of the published files; with `module_names` those
    of transformers' `state_dict`. No tensor shares memory with the model. `bucket_bytes`: about the number of bytes
    that are exchanged at a time.
    """
    ranks, like = layout(), next(model.parameters())
    own = held_parameters(model, shape, ranks.tensor_size)
    owned = {name for name, part in own.items() if not part.copy}
    owner = {name: stage for stage, names in enumerate(gather_objects(owned, ranks.pipeline_group)) for name in names}
    table, names = parameter_table(shape), parameter_names(shape)
    if homeless := next((name for name in table if name not in owner), None):
        raise ValueError(f"{homeless}: no pipeline stage holds this parameter")
    done = 0
    for bucket in make_buckets(table, owner, most_values=bucket_bytes // like.element_size()):
        published = [source.name for entry in bucket.entries for source in entry.sources]
        for name, tensor in zip(published, gather_bucket(bucket, own, like, ranks), strict=True):
            yield (names.module_name(name) if module_names else name), tensor
        done += len(bucket.entries)
        if progress:
            progress(done, len(table))


def write_hf(
    model: nn.Module, shape: ModelShape, folder: Path | str, source: Path | str, progress: Progress | None = None
) -> None:
    """Writes the model as a Hugging Face folder that transformers loads; rank 0 writes, every rank must call.

    Config, tokenizer, processor and chat template are copied from `source`. The folder appears complete or not at
    all, and replaces an older one at the same place. Raises InputFailed, a ValueError, on every rank where the disk
    does not take it.
    """
    tensors = hf_tensors(model, shape, progress=progress)

    def write() -> None:
        try:
            if layout().rank == 0:
                write_folder(tensors, Path(folder), Path(source))
        finally:  # also where the disk is full: the other ranks gather every tensor
            for _ in tensors:
                pass

    fail_together(world_group(), write)
