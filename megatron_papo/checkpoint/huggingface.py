"""A model's weights from and to Hugging Face folders, and to the engine, one parameter at a time.

Reading takes only the bytes that a rank holds. Writing and the hand-over walk the same order on all ranks of a
model-parallel group: the tensor ranks of the stage that holds a parameter gather it, then the pipeline hears it. No
rank ever holds a second copy of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_papo.checkpoint.folders import HuggingFaceReader, write_folder
from megatron_papo.checkpoint.names import module_name, parameter_table
from megatron_papo.checkpoint.parameters import Held, held_parameters
from megatron_papo.checkpoint.slices import assemble, fill_shard
from megatron_papo.model.shape import ModelShape
from megatron_papo.parallel import Layout, gather_objects, layout

Progress = Callable[[int, int], None]
"""(parameters done, parameters in all)."""


def read_hf(model: nn.Module, shape: ModelShape, folder: Path | str, progress: Progress | None = None) -> None:
    """Fills this rank's shards from a Hugging Face folder, cast to the parameters' dtype; padding becomes zero.

    Raises ValueError, on every rank alike, naming file, tensor, expected and found shape of what does not fit.
    """
    here = layout()
    fill_held(held_parameters(model, shape, here.tensor_size), shape, folder, here.tensor_rank, progress)


def fill_held(
    held: Mapping[str, Held], shape: ModelShape, folder: Path | str, tensor_rank: int, progress: Progress | None = None
) -> None:
    """`read_hf` for parameters at hand."""
    with HuggingFaceReader(folder) as reader:
        reader.check(shape)
        for done, part in enumerate(held.values()):
            fill_shard(part.entry, part.tensor.detach(), tensor_rank, reader.read)
            if progress:
                progress(done + 1, len(held))


def hf_tensors(
    model: nn.Module, shape: ModelShape, *, module_names: bool = False, progress: Progress | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, full tensor) of the whole model, in one order on every rank of the model-parallel group.

    Collective: every rank of the group walks it to its end. Names are those of the published files; with
    `module_names` those of transformers' `state_dict`. No tensor shares the model's memory.
    """
    here = layout()
    held = held_parameters(model, shape, here.tensor_size)
    owned = {name for name, part in held.items() if not part.copy}
    owner = {name: stage for stage, names in enumerate(gather_objects(owned, here.pipeline_group)) for name in names}
    table = parameter_table(shape)
    for done, (name, entry) in enumerate(table.items()):
        if name not in owner:
            raise ValueError(f"{name}: no pipeline stage holds this parameter")
        tensors = None
        if owner[name] == here.pipeline_rank:
            tensors = assemble(entry, _gather_shards(held[name], here))
        tensors = _from_stage(owner[name], tensors, [source.shape for source in entry.sources], model, here)
        for source, tensor in zip(entry.sources, tensors, strict=True):
            yield (module_name(source.name) if module_names else source.name), tensor
        if progress:
            progress(done + 1, len(table))


@torch.no_grad()
def _gather_shards(part: Held, here: Layout) -> list[Tensor]:
    shard = part.tensor.detach().contiguous()
    if part.entry.axis is None or here.tensor_size == 1:
        return [shard]
    shards = [torch.empty_like(shard) for _ in range(here.tensor_size)]
    dist.all_gather(shards, shard, group=here.tensor_group)
    return shards


def _from_stage(
    stage: int, tensors: list[Tensor] | None, shapes: list[tuple[int, ...]], model: nn.Module, here: Layout
) -> list[Tensor]:
    """The tensors of pipeline stage `stage`, on every stage."""
    if tensors is None:
        like = next(model.parameters())
        tensors = [torch.empty(size, dtype=like.dtype, device=like.device) for size in shapes]
    if here.pipeline_size > 1:
        source = dist.get_global_rank(here.pipeline_group, stage)
        for tensor in tensors:
            dist.broadcast(tensor, src=source, group=here.pipeline_group)
    return tensors


def write_hf(
    model: nn.Module, shape: ModelShape, folder: Path | str, source: Path | str, progress: Progress | None = None
) -> None:
    """Writes the model as a Hugging Face folder that transformers loads; rank 0 writes, every rank must call.

    Config, tokenizer, processor and chat template are copied from `source`. The folder appears whole or not at all;
    an older one at the same place is replaced.
    """
    tensors = hf_tensors(model, shape, progress=progress)
    if layout().rank == 0:
        write_folder(tensors, Path(folder), Path(source))
    else:
        for _ in tensors:
            pass
    dist.barrier()
