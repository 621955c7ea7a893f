"""Checkpoint conversion against `cp` of the same bytes, in both directions, and how its time grows with the bytes.

Synthetic folders have the true shapes of Qwen2.5-VL-7B, in bfloat16: the whole model, and the same with a share of
its layers, vision layers and vocabulary. Both sides are whole commands, start-up included, and end with the bytes
forced to disk; before each run the kernel is told to forget the source's pages (the libraries' stay), so that both
read from the disk. Sides take turns, in the opposite order every other round. Bytes are those of the tensors, once. A
direction has its own `cp`, of the folder it reads; the
folders of the first direction go before the second begins, so that the disk never holds three copies of a model.
The line through all sizes (least squares) says what one second, and the 72B model, cost.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from benchmarks.rows import Row
from megatron_papo.conversion.plan import Settings, plan_target
from megatron_papo.conversion.stores import Files, num_values, view
from megatron_papo.model.parameter_map import parameter_table
from megatron_papo.model.published_shapes import published_config, published_models
from megatron_papo.model.shape import ModelShape

TOOL = Path(__file__).resolve().parents[1] / "tools" / "convert_checkpoint.py"
GB = 1e9
SIZES_GB: tuple[float | None, ...] = (1, 2, 4, 8, None)
"""The sizes that are measured, in GB; None is the whole model."""
QUICK_SIZES_GB: tuple[float | None, ...] = (0.03, 0.06)
WORKERS = (1, 2)
DIRECTIONS = ("hf-to-megatron", "megatron-to-hf")
_PIECE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Run:
    seconds: float
    resident: int = 0
    """The largest resident set of any process, in bytes."""
    anonymous: int = 0
    """The part of these bytes that no file backs, as the command itself reports it."""


Sides = dict[Any, list[Run]]
"""The runs by "cp" or the number of workers, one for each round."""


def run(
    quick: bool, rounds: int | None = None, folder: Path | None = None, sizes: tuple[float, ...] | None = None
) -> list[Row]:
    """For every size, direction and number of workers the rate beside cp's and the peak of memory, then the lines.

    Writes under `folder`, three times the size at most, and removes it all. `sizes` in GB instead of the standard ones.
    """
    rounds = rounds or (1 if quick else 3)
    chosen: tuple[float | None, ...] = sizes or (QUICK_SIZES_GB if quick else SIZES_GB)
    points: dict[tuple[str, int], list[tuple[float, float, float]]] = defaultdict(list)
    rows = []
    for size in chosen:
        with tempfile.TemporaryDirectory(dir=folder, prefix="papo_convert_") as name:
            shape = _config(size, quick)
            num_bytes = 2 * sum(num_values(entry) for entry in parameter_table(ModelShape.from_dict(shape)).values())
            for direction, sides in _measure(Path(name), shape, rounds, num_bytes):
                for workers in WORKERS:
                    points[direction, workers].append((num_bytes, _median(sides[workers]), _median(sides["cp"])))
                rows += _rows(direction, num_bytes, sides)
    if len(chosen) == 1:
        return rows
    return rows + [row for (direction, workers), some in points.items() for row in _line(direction, workers, some)]


def _measure(
    folder: Path, config: dict[str, Any], rounds: int, num_bytes: int
) -> list[tuple[str, dict[Any, list[Run]]]]:
    source, between = folder / "hf", folder / "checkpoint"
    write_folder(source, config)
    first = _rounds(DIRECTIONS[0], source, folder, rounds, num_bytes, keep=between)
    shutil.rmtree(source)
    return [(DIRECTIONS[0], first), (DIRECTIONS[1], _rounds(DIRECTIONS[1], between, folder, rounds, num_bytes))]


def _rounds(direction: str, source: Path, folder: Path, rounds: int, num_bytes: int, keep: Path | None = None) -> Sides:
    runs: Sides = defaultdict(list)
    sides: list[Any] = ["cp", *WORKERS]
    target = folder / "target"
    for number in range(rounds):
        order = sides[:: -1 if number % 2 else 1]
        for side in order:
            _forget(source)
            runs[side].append(_copy(source, target) if side == "cp" else _convert(direction, source, target, side))
            rate = num_bytes / GB / runs[side][-1].seconds
            what = "cp" if side == "cp" else f"{direction}, {side} worker{'s' * (side > 1)}"
            Console(stderr=True).print(f"[dim]{num_bytes / GB:.2f} GB: {what}: {rate:.2f} GB/s[/dim]")
            if keep is not None and side != "cp" and number == rounds - 1 and not keep.exists():
                target.rename(keep)
            shutil.rmtree(target, ignore_errors=True)
    return runs


def _copy(source: Path, target: Path) -> Run:
    began = time.monotonic()
    subprocess.run(["cp", "-r", source, target], check=True)
    subprocess.run(["sync", *target.iterdir(), target], check=True)
    return Run(time.monotonic() - began)


def _convert(direction: str, source: Path, target: Path, workers: int) -> Run:
    command = [sys.executable, TOOL, direction, source, target, "--workers", str(workers)]
    began = time.monotonic()
    own = {**os.environ, "PYTHONPATH": str(TOOL.parents[1])}  # this folder's package, whatever else is installed
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True, env=own)
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{direction} ended with {process.returncode}: {said}")
    match = re.search(r"GiB, ([\d.]+) of it", said)
    assert match, said
    return Run(seconds, usage.ru_maxrss * 1024, int(float(match[1]) * 2**30))


def _rows(direction: str, num_bytes: int, sides: Sides) -> list[Row]:
    rows = []
    for workers in WORKERS:
        what = f"{num_bytes / GB:.2f} GB: {direction}, {workers} worker{'s' * (workers > 1)}"
        own, other = sides[workers], sides["cp"]
        ratio = statistics.median(b.seconds / a.seconds for a, b in zip(own, other, strict=True))
        rates = (num_bytes / GB / _median(some) for some in (own, other))
        rows.append(Row(f"{what} / cp", *rates, ratio, "GB/s"))
        peaks = (max(getattr(one, key) for one in own) / 2**30 for key in ("resident", "anonymous"))
        resident, anonymous = peaks
        rows.append(Row(f"{what}: peak resident / of 2 GiB", resident, 2.0, resident / 2, "GiB"))
        rows.append(Row(f"{what}: peak anonymous / of 2 GiB", anonymous, 2.0, anonymous / 2, "GiB"))
    return rows


def _line(direction: str, workers: int, points: list[tuple[float, float, float]]) -> list[Row]:
    """Seconds of the line at the 72B model's bytes, beside those of a straight share of the largest point; how straight
    it is; and the rate of its slope, which leaves out what a command costs before its first byte, beside cp's."""
    sizes, seconds, copying = (np.array(column) for column in zip(*points))
    slope, start = np.polyfit(sizes, seconds, 1)
    other = np.polyfit(sizes, copying, 1)[0]
    worst = float(np.abs(start + slope * sizes - seconds).max() / seconds.max())
    large = 2 * published_models()["Qwen2.5-VL-72B"]
    expected, share = float(start + slope * large), float(seconds[-1] * large / sizes[-1])
    what = f"line: {direction}, {workers} worker{'s' * (workers > 1)}"
    return [
        Row(f"{what}: 72B, {large / GB:.0f} GB / the largest point's share", expected, share, expected / share, "s"),
        Row(f"{what}: worst point off it / of the largest", worst * seconds.max(), seconds.max(), worst, "s"),
        Row(f"{what}: beyond the start / cp", 1 / slope / GB, 1 / other / GB, other / slope, "GB/s"),
    ]


def _median(runs: list[Run]) -> float:
    return statistics.median(one.seconds for one in runs)


def _forget(folder: Path) -> None:
    """Drops the pages of the folder's files, which are on disk, from the kernel's cache."""
    for file in folder.iterdir():
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def _config(size_gb: float | None, quick: bool) -> dict[str, Any]:
    """The 7B model's with as large a share of layers and words as `size_gb` asks for; quick: an eighth as wide."""
    config = published_config("Qwen2.5-VL-7B")
    if quick:
        config |= {"hidden_size": 512, "intermediate_size": 2368, "num_attention_heads": 4, "num_key_value_heads": 2}
        config["vision_config"] |= {"hidden_size": 160, "intermediate_size": 428, "num_heads": 2}
        config["vision_config"]["out_hidden_size"] = 512
    if size_gb is not None:
        share = size_gb * GB / (2 * (published_models()["Qwen2.5-VL-7B"] // (49 if quick else 1)))
        layers = max(1, round(config["num_hidden_layers"] * share))
        depth = max(1, round(config["vision_config"]["depth"] * share))
        config |= {"num_hidden_layers": layers, "vocab_size": max(1, round(1188 * share)) * 128}
        config["vision_config"] |= {"depth": depth, "fullatt_block_indexes": [depth - 1]}
    return config


def write_folder(folder: Path, config: dict[str, Any]) -> None:
    """Random bfloat16 weights of these shapes, a piece at a time, as a Hugging Face folder forced to disk."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    table = parameter_table(ModelShape.from_dict(config))
    dtypes = dict.fromkeys(table, torch.bfloat16)
    store, units = plan_target("megatron-to-hf", folder, table, dtypes, Settings(file_bytes=4 * 10**9))
    piece = view(torch.randn(_PIECE_BYTES // 2, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16())
    with Files(folder, os.O_RDWR | os.O_CREAT) as files:
        for unit in units:
            files.write(unit.file, 0, unit.around[0][1])
            at, number = len(unit.around[0][1]), 0
            while at < unit.num_bytes:
                begin = number * 4242 % 99_991 * 2  # no two pieces alike
                length = min(_PIECE_BYTES - begin, unit.num_bytes - at)
                files.write(unit.file, at, piece[begin : begin + length])
                at, number = at + length, number + 1
            os.fsync(files.handle(unit.file))
    if len(units) > 1:
        weight_map = {name: stored.file for name, stored in store.tensors.items()}  # type: ignore[attr-defined]
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
