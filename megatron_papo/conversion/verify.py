"""Proof of a converted folder by its manifest, and comparison of any two folders.

`verify` computes every hash of a converted folder anew, and of the source it came from. The target is read once. Its
own form must have the hashes of the manifest. Put back into the source's form, it must have those of the source's
tensors as they were cast and, where the cast keeps every value, of the source's tensors themselves. If the source is
given, it is read and hashed too, as if it were converted again. `compare` reads two folders of either kind, compares
them bit for bit, and needs no manifest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_papo.conversion.convert import chunk_for
from megatron_papo.conversion.huggingface_files import compare_with_library
from megatron_papo.conversion.journal import form, record_of, source_wants
from megatron_papo.conversion.manifest import MANIFEST_FILE, dtype_name, names, read_manifest
from megatron_papo.conversion.plan import Direction, open_store
from megatron_papo.conversion.stores import Files, Store, chunks, parameter_bytes, read_rows, spans, width
from megatron_papo.conversion.stream import BITS, Forms, Outcome, ParameterCopy, Stream, Wants, exact
from megatron_papo.conversion.workers import ByteProgress, Workers
from megatron_papo.distributed.exchange import larger
from megatron_papo.model.parameter_map import ParameterEntry, parameter_table
from megatron_papo.model.shape import ModelShape


@dataclass(frozen=True)
class Verdict:
    """What `verify` came to."""

    faults: list[str]
    """A line for each wrong tensor, naming its file."""
    num_tensors: int
    num_bytes: int
    inexact: bool
    """Whether the cast rounded: then the target alone proves the source as it was cast, not the source's own bits."""


def verify(folder: Path, memory_bytes: int, workers: Workers, source: Path | None = None) -> Verdict:
    """Proves a folder that a conversion wrote, and its `source` if that is given. All workers call it together.

    Raises ValueError for a folder that cannot be read.
    """
    manifest = read_manifest(folder)
    shape = ModelShape.from_folder(folder)
    table = parameter_table(shape)
    _check_names(folder, manifest, table)
    # no checksums of boxes: the manifest's hashes say more, and name the tensors that differ
    stores = [open_store(each, shape, checked=False) for each in (folder, source) if each]
    chunk_bytes = chunk_for(memory_bytes, table, *stores)
    compare_with_library(workers, shape, *(store.folder for store in stores))
    total = sum(parameter_bytes(store, entry) for store in stores for entry in table.values())
    own = _own(list(table.values()), stores[0], workers)
    faults: list[str] = []
    with ByteProgress(workers, "verify", total) as progress:
        prover = _Prover(folder, manifest, stores[0], faults)
        jobs = [ParameterCopy(entry, stores[0].dtype(entry), prover.back(entry)) for entry in own]
        Stream(stores[0], prover.wants, chunk_bytes, prover.target, moved=_in_bytes(progress, jobs)).run(jobs)
        if source:
            prover = _Prover(source, manifest, stores[1], faults)
            jobs = [ParameterCopy(entry, stores[1].dtype(entry), stores[0].dtype(entry)) for entry in own]
            wants = source_wants(manifest["direction"])
            Stream(stores[1], wants, chunk_bytes, prover.source, moved=_in_bytes(progress, jobs)).run(jobs)
        workers.wait_for_all(progress.update)
    everywhere = [fault for several in workers.gather(faults) for fault in several]
    inexact = any(not cast["exact"] for cast in manifest["casts"])
    return Verdict(everywhere, len(manifest["source"]) + len(manifest["target"]), total, inexact)


def _in_bytes(progress: ByteProgress, jobs: Sequence[ParameterCopy]) -> Any:
    """Counts bytes as they are read, whereas the stream counts them as they are cast."""
    if not jobs:
        return progress.moved
    scale = jobs[0].dtype.itemsize, jobs[0].other.itemsize
    return lambda count: progress.moved(count * scale[0] // scale[1])


def _own(entries: list[ParameterEntry], store: Store, workers: Workers) -> list[ParameterEntry]:
    """This worker's share of the parameters: about as many bytes as any other's, in the order of the files."""
    total, before, own = sum(parameter_bytes(store, entry) for entry in entries), 0, []
    for entry in entries:
        size = parameter_bytes(store, entry)
        if (before + size // 2) * workers.size // total == workers.rank:
            own.append(entry)
        before += size
    return own


def _check_names(folder: Path, manifest: dict[str, Any], table: dict[str, ParameterEntry]) -> None:
    from_hf = manifest["direction"] == "hf-to-megatron"
    for side, huggingface in (("source", from_hf), ("target", not from_hf)):
        expected = {name for entry in table.values() for name, _ in names(entry, huggingface)}
        if expected != set(manifest[side]):
            name = sorted(expected ^ set(manifest[side]))[0]
            raise ValueError(
                f"{folder / MANIFEST_FILE}: {name}: in the manifest or in the model of config.json, not in both"
            )


class _Prover:
    """Compares the hashes of one folder, as they are computed, with the manifest; adds lines to `faults`."""

    def __init__(self, folder: Path, manifest: dict[str, Any], store: Store, faults: list[str]):
        self._folder, self._manifest, self._store, self._faults = folder, manifest, store, faults
        self._direction: Direction = manifest["direction"]
        self._from_hf = self._direction == "hf-to-megatron"
        self.wants = Wants(cast_parameter=not self._from_hf, cast_sources=self._from_hf)

    def back(self, entry: ParameterEntry) -> torch.dtype:
        """The dtype that the target is cast to: the source's where that gives the source's bits, else its own."""
        source = getattr(torch, self._manifest["source"][names(entry, self._from_hf)[0][0]]["dtype"])
        own = self._store.dtype(entry)
        return source if exact(source, own) else own

    def target(self, outcome: Outcome) -> None:
        """Compares a parameter that was read from the target."""
        entry = outcome.entry
        if self._differs("target", "hash", entry, outcome.read, "is not what was written"):
            return
        if self._differs("source", "cast_hash", entry, outcome.read, "does not follow from the target"):
            return
        source = self._manifest["source"][names(entry, self._from_hf)[0][0]]
        if exact(getattr(torch, source["dtype"]), self._store.dtype(entry)):
            self._differs("source", "hash", entry, outcome.cast, "does not follow from the target")

    def source(self, outcome: Outcome) -> None:
        """Compares a parameter that was read from the source."""
        record = record_of(outcome, self._direction)
        entry = outcome.entry
        for side, key, digests, huggingface in (
            ("source", "hash", record.source, self._from_hf), ("source", "cast_hash", record.cast, self._from_hf),
            ("target", "hash", record.target, not self._from_hf),
        ):  # fmt: skip
            for (name, _), digest in zip(names(entry, huggingface), digests, strict=True):
                if self._manifest[side][name][key] != digest:
                    self._fault(entry, name, "is not what was converted")
                    return

    def _differs(self, side: str, key: str, entry: ParameterEntry, forms: Forms, says: str) -> bool:
        huggingface = (side == "source") == self._from_hf
        wrong = [
            name
            for (name, _), digest in zip(names(entry, huggingface), form(forms, huggingface), strict=True)
            if self._manifest[side][name][key] != digest
        ]
        for name in wrong:
            self._fault(entry, name, says)
        return bool(wrong)

    def _fault(self, entry: ParameterEntry, name: str, says: str) -> None:
        """Adds a line that names the file which holds the tensor, the first file if there are several."""
        file = next(self._store.strips(entry, 0, entry.shape[0])).file
        dtype = dtype_name(self._store.dtype(entry))
        self._faults.append(f"{self._folder / file}: {name} ({dtype}): {says}: its hash differs from the manifest's")


def compare(first: Path, second: Path, memory_bytes: int, workers: Workers, limit: int = 10) -> list[str]:
    """The first `limit` differences, a line a tensor by its Hugging Face name; none if the weights are the same.

    All workers call it together. Raises ValueError for a folder that cannot be read, and for folders of two models.
    """
    shape = ModelShape.from_folder(first)
    stores = open_store(first, shape), open_store(second, _shape_of(second, shape))
    table = parameter_table(shape)
    chunk_bytes = chunk_for(memory_bytes, table, *stores)
    compare_with_library(workers, shape, first, second)
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
        workers.wait_for_all(progress.update)
    everywhere = {index: lines for some in workers.gather(faults) for index, lines in some.items()}
    return [line for index in sorted(everywhere) for line in everywhere[index]][:limit]


def _shape_of(folder: Path, other: ModelShape) -> ModelShape:
    """The shape of the model in `folder`; a checkpoint without config.json is taken to be of the `other` shape.

    Raises ValueError when `folder` describes another model.
    """
    if not (folder / "config.json").exists():
        return other
    shape = ModelShape.from_folder(folder)
    if shape.language != other.language or shape.vision != other.vision:
        raise ValueError(f"{folder / 'config.json'}: another model: {_what_differs(shape, other)}")
    return shape


def _what_differs(shape: ModelShape, other: ModelShape) -> str:
    """The family where it is another one, else the numbers of the two models that are not the same."""
    if shape.model_type != other.model_type:
        return f"model_type is {shape.model_type}, not {other.model_type}"
    pairs = {"language model": (shape.language, other.language), "vision tower": (shape.vision, other.vision)}
    return "; ".join(
        f"{name} of the {part} is {value}, not {vars(theirs)[name]}"
        for part, (mine, theirs) in pairs.items()
        for name, value in vars(mine).items()
        if value != vars(theirs)[name]
    )


@dataclass(frozen=True)
class _Side:
    """One of the two folders."""

    store: Store
    files: Files

    def rows(self, entry: ParameterEntry, start: int, stop: int) -> Tensor:
        """Rows `start : stop` of a parameter, as a matrix."""
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
        bits = BITS[left.itemsize]
        if torch.equal(a.view(bits), b.view(bits)):
            continue
        for span in spans(entry, start, stop):
            rows = slice(span.row - start, span.row - start + span.length)
            differ = a[rows].view(bits) != b[rows].view(bits)  # bit patterns, so that a NaN equals itself
            counts[span.source] += int(differ.sum())
            gap = (a[rows][differ].double() - b[rows][differ].double()).abs()
            if gap.numel():
                gaps[span.source] = larger(gaps[span.source], gap.max().item())
    return [
        f"{source.name}: {count} of {torch.Size(source.shape).numel()} values differ, by at most {gap:.3g}"
        for source, count, gap in zip(entry.sources, counts, gaps)
        if count
    ]
