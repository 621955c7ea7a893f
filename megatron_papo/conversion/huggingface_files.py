"""The tensors of a Hugging Face folder as a store: where their rows lie in files, read from headers or planned."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_papo.conversion.spans import spans, width
from megatron_papo.conversion.stores import Files, Strip
from megatron_papo.model.parameter_map import ParameterEntry
from megatron_papo.model.shape import ModelShape
from megatron_papo.weights.huggingface_folder import find_weights
from megatron_papo.weights.safetensors_header import DTYPES, Stored

NAMES = {dtype: name for name, dtype in DTYPES.items()}


class HuggingFaceFiles:
    """The tensors of a folder by published name."""

    def __init__(self, folder: Path, tensors: Mapping[str, Stored]):
        self.folder, self.tensors = folder, tensors

    @classmethod
    def read(cls, folder: Path, shape: ModelShape) -> HuggingFaceFiles:
        """From the headers. Raises ValueError, a line a fault, naming file and tensor."""
        weights = find_weights(folder, shape)
        weights.check(shape)
        weights.check_head(shape)
        return cls(folder, weights.tensors)

    def dtype(self, entry: ParameterEntry) -> torch.dtype:
        """Raises ValueError where the tensors of one parameter differ in it."""
        parts = [self.tensors[source.name] for source in entry.sources]
        for source, part in zip(entry.sources, parts):
            if part.dtype != parts[0].dtype:
                raise ValueError(
                    f"{self.folder / part.file}: {source.name}: is {part.dtype}, {entry.sources[0].name} is "
                    f"{parts[0].dtype}: they are one parameter of the checkpoint and need one dtype"
                )
        return parts[0].dtype

    def check(self, files: Files, entry: ParameterEntry, strip: Strip, data: memoryview) -> None:
        """Published folders have no checksums."""

    def strips(self, entry: ParameterEntry, start: int, stop: int) -> Iterator[Strip]:
        columns = width(entry)
        for span in spans(entry, start, stop):
            stored = self.tensors[entry.sources[span.source].name]
            offset = stored.offset + span.start * columns * stored.dtype.itemsize
            yield Strip(stored.file, offset, span.row, span.length, 0, columns)


def plan_file(
    name: str, entries: list[ParameterEntry], dtypes: Mapping[str, torch.dtype]
) -> tuple[dict[str, Stored], bytes]:
    """The places of the tensors of `entries` in one file, one after the other, and the bytes before them."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at, places = 0, {}
    for entry in entries:
        for source in entry.sources:
            stored = places[source.name] = Stored(name, at, dtypes[entry.name], source.shape)
            facts = {"dtype": NAMES[stored.dtype], "shape": list(source.shape)}
            header[source.name] = {**facts, "data_offsets": [at, at := at + stored.num_bytes]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    placed = {key: Stored(name, base + part.offset, part.dtype, part.shape) for key, part in places.items()}
    return placed, len(text).to_bytes(8, "little") + text
