"""The differences between the weights in two folders, each of either kind, bit for bit and in bounded memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_papo.conversion.convert import chunk_for
from megatron_papo.conversion.folder_check import look
from megatron_papo.conversion.plan import open_store, parameter_bytes
from megatron_papo.conversion.progress_bar import ByteProgress
from megatron_papo.conversion.spans import chunks, spans, width
from megatron_papo.conversion.stores import Files, Store, read_rows
from megatron_papo.conversion.workers import Workers
from megatron_papo.distributed.exchange import larger
from megatron_papo.model.parameter_map import ParameterEntry, parameter_table
from megatron_papo.model.shape import ModelShape

_BITS = {2: torch.int16, 4: torch.int32}


def compare(first: Path, second: Path, memory_bytes: int, workers: Workers, limit: int = 10) -> list[str]:
    """The first `limit` differences, a line a tensor by its Hugging Face name. Empty: they are the same. Collective.

    Raises ValueError for a folder that cannot be read, and for two models.
    """
    shape = ModelShape.from_folder(first)
    stores = open_store(first, shape), open_store(second, _shape_of(second, shape))
    table = parameter_table(shape)
    chunk_bytes = chunk_for(memory_bytes, table, *stores)
    look(workers, first, second)
    faults: dict[int, list[str]] = {}
    total = sum(parameter_bytes(stores[0], entry) for entry in table.values())
    with Files(first) as left, Files(second) as right, ByteProgress(workers, "verify", total) as progress:
        both = (_Side(stores[0], left), _Side(stores[1], right))
        for index, entry in enumerate(table.values()):
            if index % workers.size == workers.rank:
                faults[index] = _differences(entry, both, chunk_bytes)
                progress.moved(parameter_bytes(stores[0], entry))
                if sum(map(len, faults.values())) >= limit:
                    break
        workers.wait_for_all(progress.look)
    everywhere = {index: lines for some in workers.gather(faults) for index, lines in some.items()}
    return [line for index in sorted(everywhere) for line in everywhere[index]][:limit]


def _shape_of(folder: Path, other: ModelShape) -> ModelShape:
    """Raises ValueError when `folder` names another model; a checkpoint without config.json is taken for the same."""
    if not (folder / "config.json").exists():
        return other
    shape = ModelShape.from_folder(folder)
    if shape.language != other.language or shape.vision != other.vision:
        raise ValueError(f"{folder / 'config.json'}: another model: {shape} is not {other}")
    return shape


@dataclass(frozen=True)
class _Side:
    store: Store
    files: Files

    def rows(self, entry: ParameterEntry, start: int, stop: int) -> Tensor:
        dtype = self.store.dtype(entry)
        data = torch.empty((stop - start) * width(entry) * dtype.itemsize, dtype=torch.uint8)
        read_rows(self.files, self.store, entry, start, stop, data)
        return data.view(dtype).view(stop - start, -1)


def _differences(entry: ParameterEntry, sides: tuple[_Side, _Side], chunk_bytes: int) -> list[str]:
    left, right = (side.store.dtype(entry) for side in sides)
    if left != right:
        return [f"{source.name}: dtype {left} and {right}" for source in entry.sources]
    counts, gaps = [0] * len(entry.sources), [0.0] * len(entry.sources)
    for start, stop in chunks(entry.shape[0], width(entry) * left.itemsize, chunk_bytes):
        a, b = (side.rows(entry, start, stop) for side in sides)
        bits = _BITS[left.itemsize]
        if torch.equal(a.view(bits), b.view(bits)):
            continue
        for span in spans(entry, start, stop):
            rows = slice(span.row - start, span.row - start + span.length)
            differ = a[rows].view(bits) != b[rows].view(bits)  # bit patterns: NaNs that are the same count as equal
            counts[span.source] += int(differ.sum())
            gap = (a[rows][differ].double() - b[rows][differ].double()).abs()
            if gap.numel():
                gaps[span.source] = larger(gaps[span.source], gap.max().item())
    return [
        f"{source.name}: {count} of {torch.Size(source.shape).numel()} values differ, by at most {gap:.3g}"
        for source, count, gap in zip(entry.sources, counts, gaps)
        if count
    ]
