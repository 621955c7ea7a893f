"""Reads the weights of a Hugging Face folder by published name, for training, scoring, conversion and verification.

`weight_files.py` says which files are read, `safetensors_header.py` reads their headers. In some cases transformers
silently takes one of several tensors: two names of one tensor, two files that have it, a separate head beside tied
embeddings. This module refuses them, since nobody can tell which one was meant.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_papo.files.json_keys import shown_name
from megatron_papo.model.parameter_map import parameter_names, parameter_table
from megatron_papo.model.shape import ModelShape
from megatron_papo.weights.safetensors_header import Stored, read_header
from megatron_papo.weights.weight_files import INDEX_FILE, MAX_SHOWN_FAULTS, WeightFiles, weight_files

_ROWS_AT_ONCE = 8192
"""Number of rows of head and word embedding that are compared at a time."""


@dataclass(frozen=True)
class Weights:
    """The tensors of a folder, as the headers of its files describe them; `find_weights` makes it."""

    folder: Path
    files: WeightFiles
    tensors: Mapping[str, Stored]
    """Published name -> where the tensor lies."""
    written: Mapping[str, str]
    """Published name -> the name in the file."""

    def check(self, shape: ModelShape) -> None:
        """Raises ValueError with a line for each tensor of the model that is missing, extra or misshapen."""
        expected = {s.name: s.shape for entry in parameter_table(shape).values() for s in entry.sources}
        names = parameter_names(shape)
        if shape.tie_word_embeddings and names.HEAD in self.tensors:
            expected[names.HEAD] = expected[names.EMBEDDING]  # the head repeats the word embedding
        named = {names.published_name(name): self.folder / file for name, file in self.files.index.items()}
        faults = [
            f"{named.get(name, self.folder)}: {name} {expected[name]}: missing"
            for name in expected
            if name not in self.tensors
        ]
        for name, stored in sorted(self.tensors.items()):
            file = self.folder / stored.file
            if name not in expected:
                faults.append(
                    f"{file}: {shown_name(name)} {stored.shape}: no such tensor in the model that config.json describes"
                )
            elif stored.shape != expected[name]:
                faults.append(f"{file}: {name}: expected shape {expected[name]}, found {stored.shape}")
        tied = {names.HEAD} if shape.tie_word_embeddings else set()  # a tied head may be missing
        for name in sorted(named.keys() - expected.keys() - self.tensors.keys() - tied):
            faults.append(f"{named[name]}: {shown_name(name)}: not there, though {INDEX_FILE} says so")
        raise_faults(faults)

    def check_head(self, shape: ModelShape) -> None:
        """Raises ValueError where embeddings are tied and the head has other values than the word embedding:
        transformers then takes the head, against its own settings, and vLLM one or the other. Reads both tensors, if
        both exist."""
        names = parameter_names(shape)
        if not shape.tie_word_embeddings or names.HEAD not in self.tensors:
            return
        with OpenWeights(self) as opened:
            for start in range(0, shape.language.vocab_size, _ROWS_AT_ONCE):
                rows = (slice(start, start + _ROWS_AT_ONCE),)
                head, words = opened.read(names.HEAD, rows), opened.read(names.EMBEDDING, rows)
                wider = torch.promote_types(head.dtype, words.dtype)
                if not torch.equal(head.to(wider), words.to(wider)):
                    raise ValueError(
                        f"{self.folder / self.tensors[names.HEAD].file}: {names.HEAD}: differs from the word "
                        "embedding, to which config.json ties it: tie_word_embeddings=false there trains it as it is "
                        "(as transformers reads it); a head that is not meant has to leave the file"
                    )


class OpenWeights:
    """Reads slices of tensors through the safetensors library; to be used as a context manager."""

    def __init__(self, weights: Weights):
        self._weights = weights
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        self._slices: dict[str, Any] = {}

    def __enter__(self) -> OpenWeights:
        with ExitStack() as stack:
            for file in self._weights.files.files:
                try:
                    self._files[file.name] = stack.enter_context(safe_open(file, framework="pt"))
                except (SafetensorError, OSError) as error:
                    raise ValueError(f"{file}: not a whole safetensors file: {error}") from None
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._slices.clear()
        self._files.clear()
        self._stack.close()

    def read(self, name: str, index: tuple[slice, ...]) -> torch.Tensor:
        """The values `tensor[index]` of the tensor with this published name; `index` has ranges along the leading axes.
        No other bytes are read."""
        if name not in self._slices:
            file = self._files[self._weights.tensors[name].file]
            self._slices[name] = file.get_slice(self._weights.written[name])
        return self._slices[name][index]


def find_weights(folder: Path, shape: ModelShape) -> Weights:
    """The tensors in the headers of the files that transformers reads, by the names of `shape`'s family. Raises
    ValueError with one line that names file and tensor."""
    files = weight_files(folder)
    published_name = parameter_names(shape).published_name
    tensors: dict[str, Stored] = {}
    written: dict[str, str] = {}
    for file in files.files:
        for name, stored in read_header(file).items():
            if files.index.get(name, file.name) != file.name:
                raise ValueError(f"{file}: {shown_name(name)}: lies here, but in {files.index[name]} by {INDEX_FILE}")
            published = published_name(name)
            if published in tensors:
                raise ValueError(f"{file}: {shown_name(name)}: lies in {tensors[published].file} already")
            tensors[published], written[published] = stored, name
    return Weights(folder, files, tensors, written)


def raise_faults(faults: list[str]) -> None:
    """Raises ValueError with the first of `faults`, one on each line, if there are any."""
    if faults:
        more = [f"... and {len(faults) - MAX_SHOWN_FAULTS} more"] if len(faults) > MAX_SHOWN_FAULTS else []
        raise ValueError("\n".join(faults[:MAX_SHOWN_FAULTS] + more))
