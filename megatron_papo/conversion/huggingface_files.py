"""The tensors of a Hugging Face folder: where their rows lie in files, read from headers or planned.

Before such a folder is read, `compare_with_library` has the safetensors library read a little of every tensor, beside
this package's own reading of the headers, which the conversion relies on: name, shape, type, first and last row. That
the files are those that transformers would read is a rule (weights/weight_files.py), which a test compares with
transformers itself: importing it here would take longer than most conversions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_papo.checkpoint.state_file import names_checkpoint
from megatron_papo.conversion.stores import Files, Strip, spans, view, width
from megatron_papo.conversion.workers import Workers
from megatron_papo.model.parameter_map import ParameterEntry
from megatron_papo.model.shape import ModelShape
from megatron_papo.weights.huggingface_folder import find_weights
from megatron_papo.weights.safetensors_header import DTYPES, Stored

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class HuggingFaceFiles:
    """A store of the tensors of a folder, by published name."""

    def __init__(self, folder: Path, tensors: Mapping[str, Stored]):
        self.folder, self.tensors = folder, tensors

    @classmethod
    def read(cls, folder: Path, shape: ModelShape) -> HuggingFaceFiles:
        """The store that the headers describe. Raises ValueError, a line a fault, naming file and tensor."""
        weights = find_weights(folder, shape)
        weights.check(shape)
        weights.check_head(shape)
        return cls(folder, weights.tensors)

    def dtype(self, entry: ParameterEntry) -> torch.dtype:
        """The dtype of a parameter. Raises ValueError where its tensors have different ones."""
        parts = [self.tensors[source.name] for source in entry.sources]
        for source, part in zip(entry.sources, parts):
            if part.dtype != parts[0].dtype:
                raise ValueError(
                    f"{self.folder / part.file}: {source.name}: is {part.dtype}, {entry.sources[0].name} is "
                    f"{parts[0].dtype}: they are one parameter of the checkpoint and need one dtype"
                )
        return parts[0].dtype

    def check(self, files: Files, entry: ParameterEntry, strip: Strip, data: memoryview) -> None:
        """Checks nothing: published folders have no checksums."""

    def strips(self, entry: ParameterEntry, start: int, stop: int) -> Iterator[Strip]:
        columns = width(entry)
        for span in spans(entry, start, stop):
            stored = self.tensors[entry.sources[span.source].name]
            offset = stored.offset + span.start * columns * stored.dtype.itemsize
            yield Strip(stored.file, offset, span.row, span.length, 0, columns)


def plan_file(
    name: str, entries: list[ParameterEntry], dtypes: Mapping[str, torch.dtype]
) -> tuple[dict[str, Stored], bytes]:
    """Plans one file, which holds the tensors of `entries` one after the other.

    Returns the place of each tensor, by its published name, and the header: the bytes before the first tensor.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at, places = 0, {}
    for entry in entries:
        for source in entry.sources:
            stored = places[source.name] = Stored(name, at, dtypes[entry.name], source.shape)
            facts = {"dtype": _NAMES[stored.dtype], "shape": list(source.shape)}
            header[source.name] = {**facts, "data_offsets": [at, at := at + stored.num_bytes]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    placed = {key: Stored(name, base + part.offset, part.dtype, part.shape) for key, part in places.items()}
    return placed, len(text).to_bytes(8, "little") + text


def compare_with_library(workers: Workers, shape: ModelShape, *folders: Path) -> None:
    """Compares, on the first worker, how the safetensors library reads those `folders` that are Hugging Face folders.

    They hold weights of a model of `shape` and need no config.json of their own. Raises ValueError on every worker,
    naming the tensor that the library reads differently.
    """
    workers.first(lambda: _compare([folder for folder in folders if not names_checkpoint(folder)], shape))


def _compare(folders: list[Path], shape: ModelShape) -> None:
    for folder in folders:
        _compare_folder(folder, shape)


def _compare_folder(folder: Path, shape: ModelShape) -> None:
    weights = find_weights(folder, shape)
    with Files(folder) as files:
        for name, stored in weights.tensors.items():
            try:
                agrees = _agrees(files, folder / stored.file, weights.written[name], stored)
            except SafetensorError:
                agrees = False
            if not agrees:
                raise ValueError(f"{folder / stored.file}: {name}: the safetensors library reads it otherwise")


def _agrees(files: Files, file: Path, written: str, stored: Stored) -> bool:
    if not stored.shape:
        return True
    num_bytes = stored.num_bytes // stored.shape[0]
    # opened for each tensor: what the library has mapped and touched counts as memory of this process
    with safe_open(file, framework="pt") as opened:
        tensor = opened.get_slice(written)
        for row in {0, stored.shape[0] - 1}:
            theirs = tensor[row : row + 1].contiguous()
            ours = files.some(stored.file, stored.offset + row * num_bytes, num_bytes)
            if theirs.dtype != stored.dtype or theirs.shape[1:] != stored.shape[1:] or bytes(view(theirs)) != ours:
                return False
    return True
