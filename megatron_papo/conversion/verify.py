"""Proof of a converted folder from its manifest, and of the source it came from: every hash is computed anew.

The target is read once. Its own form must have the manifest's hashes; put back into the source's form it must have
those of the source's tensors as they were cast and, where the cast keeps every value, of the source's tensors
themselves. With the source at hand, that is read and hashed too, as if it were converted again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_papo.conversion.convert import chunk_for
from megatron_papo.conversion.file_units import form, record_of, source_wants
from megatron_papo.conversion.folder_check import look
from megatron_papo.conversion.hashing import Forms
from megatron_papo.conversion.manifest import MANIFEST_FILE, dtype_name, names, read_manifest
from megatron_papo.conversion.plan import Direction, open_store, parameter_bytes
from megatron_papo.conversion.progress_bar import ByteProgress
from megatron_papo.conversion.stores import Store
from megatron_papo.conversion.stream import Outcome, ParameterCopy, Stream, Wants, exact
from megatron_papo.conversion.workers import Workers
from megatron_papo.model.parameter_map import ParameterEntry, parameter_table
from megatron_papo.model.shape import ModelShape


@dataclass(frozen=True)
class Verdict:
    faults: list[str]
    """A line a tensor, naming its file."""
    num_tensors: int
    num_bytes: int
    inexact: bool
    """The cast rounded: the target alone cannot prove the source's own bits, only the cast ones."""


def verify(folder: Path, memory_bytes: int, workers: Workers, source: Path | None = None) -> Verdict:
    """Of a folder that a conversion wrote. Collective. Raises ValueError for a folder that cannot be read."""
    manifest = read_manifest(folder)
    shape = ModelShape.from_folder(folder)
    table = parameter_table(shape)
    _check_names(folder, manifest, table)
    # the manifest says more than checksums of boxes, and which tensors differ
    stores = [open_store(each, shape, checked=False) for each in (folder, source) if each]
    chunk_bytes = chunk_for(memory_bytes, table, *stores)
    look(workers, *(store.folder for store in stores))
    total = sum(parameter_bytes(store, entry) for store in stores for entry in table.values())
    own = _own(list(table.values()), stores[0], workers)
    found: list[str] = []
    with ByteProgress(workers, "verify", total) as progress:
        prover = _Prover(folder, manifest, stores[0], found)
        jobs = [ParameterCopy(entry, stores[0].dtype(entry), prover.back(entry)) for entry in own]
        Stream(stores[0], prover.wants, chunk_bytes, prover.target, moved=_in_bytes(progress, jobs)).run(jobs)
        if source:
            prover = _Prover(source, manifest, stores[1], found)
            jobs = [ParameterCopy(entry, stores[1].dtype(entry), stores[0].dtype(entry)) for entry in own]
            wants = source_wants(manifest["direction"])
            Stream(stores[1], wants, chunk_bytes, prover.source, moved=_in_bytes(progress, jobs)).run(jobs)
        workers.wait_for_all(progress.look)
    faults = [fault for several in workers.gather(found) for fault in several]
    inexact = any(not cast["exact"] for cast in manifest["casts"])
    return Verdict(faults, len(manifest["source"]) + len(manifest["target"]), total, inexact)


def _in_bytes(progress: ByteProgress, jobs: Sequence[ParameterCopy]) -> Any:
    """Bytes as they are read: the stream counts them as they were cast."""
    if not jobs:
        return progress.moved
    scale = jobs[0].dtype.itemsize, jobs[0].other.itemsize
    return lambda count: progress.moved(count * scale[0] // scale[1])


def _own(entries: list[ParameterEntry], store: Store, workers: Workers) -> list[ParameterEntry]:
    """This worker's parameters, in the order of the files, about as many bytes as any other's."""
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
    """Compares what a walk over one folder found with the manifest."""

    def __init__(self, folder: Path, manifest: dict[str, Any], store: Store, faults: list[str]):
        self._folder, self._manifest, self._store, self._faults = folder, manifest, store, faults
        self._direction: Direction = manifest["direction"]
        self._from_hf = self._direction == "hf-to-megatron"
        self.wants = Wants(cast_parameter=not self._from_hf, cast_sources=self._from_hf)

    def back(self, entry: ParameterEntry) -> torch.dtype:
        """What the target is cast to: the source's dtype where that gives its bits, else nothing else."""
        source = getattr(torch, self._manifest["source"][names(entry, self._from_hf)[0][0]]["dtype"])
        own = self._store.dtype(entry)
        return source if exact(source, own) else own

    def target(self, outcome: Outcome) -> None:
        entry = outcome.entry
        if self._differs("target", "hash", entry, outcome.read, "is not what was written"):
            return
        if self._differs("source", "cast_hash", entry, outcome.read, "does not follow from the target"):
            return
        source = self._manifest["source"][names(entry, self._from_hf)[0][0]]
        if exact(getattr(torch, source["dtype"]), self._store.dtype(entry)):
            self._differs("source", "hash", entry, outcome.cast, "does not follow from the target")

    def source(self, outcome: Outcome) -> None:
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
        """Names the file that holds the tensor, the first of several."""
        file = next(self._store.strips(entry, 0, entry.shape[0])).file
        dtype = dtype_name(self._store.dtype(entry))
        self._faults.append(f"{self._folder / file}: {name} ({dtype}): {says}: its hash differs from the manifest's")
