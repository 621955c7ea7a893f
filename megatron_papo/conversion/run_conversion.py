"""One conversion or verification from its arguments: on how many workers it runs, what each does, what is printed."""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.filesize import decimal

from megatron_papo.config import ConfigError
from megatron_papo.conversion.convert import convert
from megatron_papo.conversion.plan import Direction, Settings
from megatron_papo.conversion.verify import compare, verify
from megatron_papo.conversion.workers import Workers, reason_of
from megatron_papo.runtime.launch import Work, launch, outer_rank
from megatron_papo.text.untrusted import LINES, as_text


@dataclass(frozen=True)
class ConversionRequest:
    """What is converted into what, or verified; the arguments of tools/convert_checkpoint.py."""

    verb: Literal["hf-to-megatron", "megatron-to-hf", "verify"]
    first: Path
    """The source, or the folder to verify."""
    second: Path | None
    """The target, or the folder to compare with."""
    memory_bytes: int
    dtype: str | None = None
    file_bytes: int = Settings.file_bytes
    files: Path | None = None
    """The folder that config, tokenizer and processor come from; for `verify` the source of the conversion."""


def run_conversion(request: ConversionRequest, num_workers: int) -> int:
    """Performs `request` in this process, on `num_workers` processes here, or as one of the workers that srun or
    torchrun started; the exit status, as `perform` says. Raises ValueError and OSError for what cannot be read or
    written; where several workers run, they say so themselves and the status is 2."""
    if num_workers < 1:
        raise ValueError(f"--workers: {num_workers} is not a number of processes")
    if num_workers == 1 and outer_rank(os.environ) is None:
        with Workers() as workers:
            return perform(request, workers)
    with tempfile.TemporaryDirectory(prefix="papo_convert_") as folder:
        status = Path(folder, "status")
        work_to_do = Work("megatron_papo.conversion.run_conversion:work", (request, status), Path(folder))
        code = launch(work_to_do, num_workers)
        return code or int(status.read_text() if status.exists() else 0)


def work(request: ConversionRequest, status_file: Path) -> None:
    """Performs `request` on a rank that a launcher started. Rank 0 writes the exit status to `status_file`."""
    torch.set_num_threads(1)
    with Workers() as workers:
        try:
            status = perform(request, workers)
        except (ValueError, OSError) as error:
            workers.fail(reason_of(error))
            raise ConfigError(reason_of(error)) from error  # a line, and exit status 2
        if workers.rank == 0:
            status_file.write_text(str(status))


def perform(request: ConversionRequest, workers: Workers) -> int:
    """The exit status: 0 when the conversion is done or the weights are the same, 1 when they differ.

    All workers call it together. Raises ValueError for what cannot be read or written.
    """
    if request.verb != "verify":
        return _convert(request.verb, request, workers)
    if request.second is None:
        return _verify(request, workers)
    differences = compare(request.first, request.second, request.memory_bytes, workers)
    _say(workers, "\n".join(differences) if differences else "the same, bit for bit")
    return 1 if differences else 0


def _convert(direction: Direction, request: ConversionRequest, workers: Workers) -> int:
    assert request.second is not None
    dtype = None if request.dtype is None else getattr(torch, request.dtype)
    settings = Settings(dtype, request.file_bytes)
    target = request.second
    report = convert(
        direction, request.first, target, settings, request.memory_bytes, workers, request.files,
        lambda text: _say(workers, text),
    )  # fmt: skip
    if report is not None:
        resumed = f", {report.num_kept} parameters were there already" if report.num_kept else ""
        _say(
            workers,
            f"{decimal(report.num_bytes)}{resumed}; peak memory of a worker {report.peak_bytes / 2**30:.2f} GiB, "
            f"{report.peak_anonymous_bytes / 2**30:.2f} of it beside mapped libraries\nwrote {target}",
        )
    return 0


def _verify(request: ConversionRequest, workers: Workers) -> int:
    verdict = verify(request.first, request.memory_bytes, workers, request.files)
    if verdict.faults:
        _say(workers, "\n".join(verdict.faults[:10]))
        if len(verdict.faults) > 10:
            _say(workers, f"... and {len(verdict.faults) - 10} more")
        return 1
    proven = "its source as it was cast; the cast rounded" if verdict.inexact else "its source, bit for bit"
    read = " and the source itself" if request.files else ""
    _say(workers, f"{verdict.num_tensors} hashes hold: the target{read}, and from the target {proven}")
    return 0


def _say(workers: Workers, text: str) -> None:
    if workers.rank == 0:
        print(as_text(text, LINES), flush=True)
        sys.stdout.flush()
