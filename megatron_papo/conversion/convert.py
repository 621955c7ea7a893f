"""A whole conversion: planned, distributed over the workers, resumed, finished, published.

The target is written as `NAME.tmp`, with journals in it. If the conversion is killed at any moment, the same command
continues it, with any number of workers, as long as source and settings are the same; else it starts anew. Once every
file is whole, the manifest is written, the journals are removed, and the folder gets its name.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from megatron_papo.checkpoint.state_file import write_state_tree
from megatron_papo.conversion.checkpoint_files import CheckpointFiles, state_tree, write_small_files
from megatron_papo.conversion.huggingface_files import HuggingFaceFiles, compare_with_library
from megatron_papo.conversion.journal import (
    FOLDER,
    JournalEntry,
    convert_unit,
    journal_file,
    read_journal,
    remaining_bytes,
)
from megatron_papo.conversion.manifest import MANIFEST_FILE, manifest_tree, read_manifest, write_manifest
from megatron_papo.conversion.plan import ConversionPlan, Direction, FileUnit, Settings, make_plan
from megatron_papo.conversion.stores import Store, width
from megatron_papo.conversion.stream import CHUNK_BYTES, SHARES
from megatron_papo.conversion.workers import GB, ByteProgress, Workers, memory
from megatron_papo.files.atomic_folder import publish
from megatron_papo.files.small_files import make_way, print_warning, write_atomically
from megatron_papo.model.parameter_map import ParameterEntry
from megatron_papo.model.shape import ModelShape
from megatron_papo.weights.publishing import check_side_files, copy_side_files, set_dtype
from megatron_papo.weights.weight_files import weight_files

PLAN_FILE = "plan"
"""A file in the folder of the journals: the fingerprint of the plan that they belong to."""
_SLACK_BYTES = 64 * 2**20
"""Disk space beside the files of tensors: journals, manifest, tokenizer."""
_SPARE_BYTES = 48 * 2**20
"""Memory that the libraries take while they work."""
_LEAST_CHUNK_BYTES = 64 * 2**10


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion came to."""

    num_bytes: int
    num_kept: int
    """The number of parameters that an earlier, interrupted conversion had written."""
    peak_bytes: int
    """The largest resident set of any worker, libraries included."""
    peak_anonymous_bytes: int
    """The largest part of it that no file backs, as often as it was measured."""


def convert(
    direction: Direction, source: Path, target: Path, settings: Settings, memory_bytes: int, workers: Workers,
    files: Path | None = None, say: Callable[[str], None] = print,
) -> ConversionReport | None:  # fmt: skip
    """Writes `target`; returns None when it exists already, from this source and with these settings.

    All workers call it together. Raises ValueError naming file and tensor, and, before anything is written, naming a
    folder that lacks space.
    """
    partial = target.with_name(f"{target.name}.tmp")
    plan = make_plan(direction, source, partial, settings, files)
    if len(set(workers.gather(plan.fingerprint))) != 1:
        raise ValueError(f"{source}: the workers see different files there")
    left_out = check_side_files(plan.files)
    if direction == "hf-to-megatron" and (note := weight_files(source).note()):
        left_out.insert(0, note)
    chunk_bytes = chunk_for(memory_bytes, plan.table, plan.source, plan.target)
    compare_with_library(workers, ModelShape.from_folder(plan.files), source)
    lock: list[IO[str]] = []
    start = workers.first(lambda: _prepare(plan, target, partial, lock))
    for line in [start.message, *left_out] if workers.rank == 0 else []:
        if line:
            say(line)
    report = None if start.exists else _write(plan, target, partial, chunk_bytes, workers)
    for handle in lock:
        handle.close()
    return report


def _write(plan: ConversionPlan, target: Path, partial: Path, chunk_bytes: int, workers: Workers) -> ConversionReport:
    todo = workers.first(lambda: {unit.file: remaining_bytes(plan, partial, unit) for unit in plan.units})
    kept = 0
    with ByteProgress(workers, plan.direction, plan.num_bytes, plan.num_bytes - sum(todo.values())) as progress:
        for unit in _share(plan.units, todo, workers):
            kept += convert_unit(plan, partial, unit, chunk_bytes, progress.moved)
        workers.wait_for_all(progress.update)
    workers.first(lambda: _finish(plan, target, partial))
    peaks = workers.gather((memory("VmHWM"), progress.peak_anonymous))
    resident, anonymous = (max(values) for values in zip(*peaks))
    return ConversionReport(plan.num_bytes, sum(workers.gather(kept)), resident, anonymous)


@dataclass(frozen=True)
class _Start:
    """How a conversion starts: whether the target `exists` already, and a line for the user."""

    exists: bool
    message: str = ""


def _prepare(plan: ConversionPlan, target: Path, partial: Path, lock: list[IO[str]]) -> _Start:
    """Prepares the folder, on rank 0: looks at what exists, checks the free space, and takes the lock of the folder."""
    if target.exists():
        if (target / MANIFEST_FILE).exists() and read_manifest(target).get("plan") == plan.fingerprint:
            return _Start(True, f"{target}: there already, from the same source with the same settings")
        raise ValueError(f"{target}: exists already")
    journals, message = partial / FOLDER, ""
    known = journals / PLAN_FILE
    same = known.is_file() and known.read_bytes() == plan.fingerprint.encode()
    if journals.is_dir():
        _lock(journals, partial, lock)
    if os.path.lexists(partial) and not same:
        message = f"{partial}: was begun from another source or with other settings: starting anew"
        for handle in lock:
            handle.close()
        lock.clear()
        make_way(partial)
    elif same:
        message = f"{partial}: going on with it"
    _check_space(plan, partial)
    journals.mkdir(parents=True, exist_ok=True)
    if not lock:
        _lock(journals, partial, lock)
    if not same:
        write_atomically(known, plan.fingerprint)
    return _Start(False, message)


def _lock(journals: Path, partial: Path, lock: list[IO[str]]) -> None:
    handle = (journals / "lock").open("w")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{partial}: another conversion is writing it") from None
    except OSError:
        pass  # a disk without locks
    lock.append(handle)


def _check_space(plan: ConversionPlan, partial: Path) -> None:
    parent = next(folder for folder in (partial, *partial.absolute().parents) if folder.exists())
    files = [partial / unit.file for unit in plan.units]
    written = sum(file.stat().st_blocks * 512 for file in files if file.exists())
    needed = max(0, plan.file_bytes - written) + _SLACK_BYTES
    state = os.statvfs(parent)
    free = state.f_bavail * state.f_frsize
    if needed > free:
        raise ValueError(f"{parent}: {needed / GB:.2f} GB are needed there, {free / GB:.2f} GB are free")


def _share(units: tuple[FileUnit, ...], todo: dict[str, int], workers: Workers) -> list[FileUnit]:
    """This worker's files. They are shared out from the largest on, each to the worker that has least to do."""
    loads, own = [0] * workers.size, []
    for unit in sorted(units, key=lambda unit: -todo[unit.file]):
        rank = loads.index(min(loads))
        loads[rank] += todo[unit.file] + 1
        if rank == workers.rank:
            own.append(unit)
    return own


def _finish(plan: ConversionPlan, target: Path, partial: Path) -> None:
    """Completes and publishes the target, on rank 0, when every file is whole."""
    records: dict[str, JournalEntry] = {}
    for unit in plan.units:
        records |= {record.name: record for record in read_journal(journal_file(partial, unit)).records}
    missing = [name for name in plan.table if name not in records]
    assert not missing, f"parameters that nobody wrote: {missing[:3]}"
    copy_side_files(plan.files, partial)
    if isinstance(plan.target, CheckpointFiles):
        sums = {name: record.boxes for name, record in records.items()}
        write_small_files(partial, plan.target, plan.table, f"__{len(plan.units)}_0.distcp", sums)
    else:
        assert isinstance(plan.target, HuggingFaceFiles)
        set_dtype(partial / "config.json", _main_dtype(plan))
        if len(plan.units) > 1:
            weight_map = {name: stored.file for name, stored in plan.target.tensors.items()}
            index = {"metadata": {"total_size": plan.num_bytes}, "weight_map": weight_map}
            (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    write_manifest(partial, manifest_tree(plan, records))
    if isinstance(plan.target, CheckpointFiles):
        write_state_tree(partial, state_tree())
    doomed = partial.with_name(f"{partial.name}.journal")  # out of the way in one step
    make_way(doomed)
    (partial / FOLDER).rename(doomed)
    publish(partial, target)
    try:
        shutil.rmtree(doomed)
    except OSError as error:
        print_warning(f"{doomed}: needed no more, and cannot be removed: {error.strerror}")


def _main_dtype(plan: ConversionPlan) -> torch.dtype:
    """The dtype of the largest tensor, since transformers loads all tensors in one dtype."""
    return plan.target.dtype(max(plan.table.values(), key=lambda entry: entry.shape[0] * width(entry)))


def chunk_for(memory_bytes: int, table: dict[str, ParameterEntry], *stores: Store) -> int:
    """The size of a buffer in bytes, such that all buffers fit in what the libraries leave of `memory_bytes`.

    Raises ValueError when they do not fit.
    """
    row = max(width(entry) * store.dtype(entry).itemsize for entry in table.values() for store in stores)
    least = max(row, _LEAST_CHUNK_BYTES)
    taken = memory("VmRSS") + _SPARE_BYTES
    chunk = min(CHUNK_BYTES, (memory_bytes - taken) // SHARES)
    if chunk < least:
        raise ValueError(
            f"--memory-gib: {memory_bytes / 2**30:.3f} GiB are too little: libraries and one row of the widest tensor "
            f"need {(taken + least * SHARES) / 2**30:.3f}"
        )
    return max(chunk, least)
