"""A rank's tensors as Megatron-Core `ShardedTensor`s: which box of which stored tensor each of them is.

What is stored is the whole parameter of the table of parameters: as a single tensor-parallel rank would hold it,
without padding, under its Megatron name. So a checkpoint does not depend on the layout that wrote it. Megatron's own
modules would describe the padded shards instead, and the distributed optimizer would first gather its state on every
data-parallel rank; here each rank stores the boxes that it holds, which are a shard or a flat range of one.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from megatron_papo.distributed.layout import Layout
from megatron_papo.model.parameter_map import Index, pieces
from megatron_papo.weights.held import HeldParameter


def sharded_tensors(
    key: str, held: HeldParameter, data: Tensor, layout: Layout, flat_start: int | None = None
) -> list[ShardedTensor]:
    """`data` as boxes of the stored tensor `key`. The boxes are views of `data`, so that loading fills it in place.

    `data` has the shape of the parameter (the parameter itself or its optimizer state). With `flat_start` it is instead
    the values of the flattened parameter from there on, as the distributed optimizer splits it over the data-parallel
    ranks; then no rank repeats another's values. Padding is in no box.
    """
    entry, shape = held.entry, tuple(held.tensor.shape)
    if flat_start is None:
        boxes = iter([(tuple(slice(0, size) for size in shape), data)])
    else:
        boxes = _boxes(shape, flat_start, data)
    replica = (int(held.copy), layout.tensor_rank if entry.axis is None else 0, layout.data_rank * (flat_start is None))
    axis = entry.axis or 0
    tensors = []
    for box, values in boxes:
        for piece in pieces(entry, shape, layout.tensor_rank):
            start = max(box[axis].start, piece.local)
            length = min(box[axis].stop, piece.local + piece.length) - start
            if length <= 0:
                continue
            offset = [part.start for part in box]
            offset[axis] = start - piece.local + piece.start
            view = values.narrow(axis, start - box[axis].start, length)
            tensors.append(
                ShardedTensor(key, view, view.dtype, tuple(view.shape), entry.shape, tuple(offset), None, replica)
            )
    return tensors


def _boxes(shape: tuple[int, ...], start: int, flat: Tensor) -> Iterator[tuple[Index, Tensor]]:
    """Cuts a flat range of a tensor into at most three boxes: the end of a row, whole rows, the beginning of a row.

    Yields each box as its index in the tensor and its values.
    """
    stop = start + flat.numel()
    if len(shape) == 1:
        yield (slice(start, stop),), flat
        return
    assert len(shape) == 2, shape
    columns, at = shape[1], start
    while at < stop:
        row, column = divmod(at, columns)
        rows = (stop - at) // columns if column == 0 else 0
        width = columns if rows else min(columns - column, stop - at)
        rows = max(rows, 1)
        values = flat[at - start : at - start + rows * width].view(rows, width)
        yield (slice(row, row + rows), slice(column, column + width)), values
        at += rows * width
