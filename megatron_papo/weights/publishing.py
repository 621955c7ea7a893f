"""Writes a Hugging Face folder, tensors and side files, so that it appears complete or not at all.

Tensors come with their published names; ranks play no part. `huggingface_folder.py` reads such folders.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megatron_papo.files.atomic_folder import publish
from megatron_papo.files.json_keys import read_json
from megatron_papo.files.small_files import make_way
from megatron_papo.weights import side_files
from megatron_papo.weights.weight_files import INDEX_FILE, WEIGHTS_FILE

MAX_FILE_BYTES = 5 * 10**9
_SIDE_FILES = {".json", ".jinja", ".txt", ".model", ".tiktoken"}
_NOT_SIDE_FILES = ("*.index.json", "state.json", "metadata.json", "checksums.json", "manifest.json")
"""Files that belong to the weights, to a checkpoint, or to a conversion, which describes the folder that it wrote."""


def write_folder(
    tensors: Iterable[tuple[str, Tensor]], folder: Path, source: Path, max_file_bytes: int = MAX_FILE_BYTES
) -> None:
    """Writes the named tensors as a Hugging Face folder, in files of at most `max_file_bytes` (but at least one
    tensor).

    Config, tokenizer, processor and chat template are copied from `source`. The folder appears complete or not at all:
    what was written of it is removed when the disk does not take the rest.
    """
    partial = folder.with_name(f"{folder.name}.tmp")
    make_way(partial)
    partial.mkdir(parents=True)
    try:
        dtype = _write_tensors(tensors, partial, max_file_bytes)
        copy_side_files(source, partial)
        set_dtype(partial / "config.json", dtype)
        publish(partial, folder)
    except Exception:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def copy_side_files(source: Path, target: Path) -> None:
    """Copies everything but the weights of a Hugging Face folder, or of the model folder within a checkpoint.

    Raises ValueError when `source` has no config.json, and the errors of `side_files.copy`.
    """
    for file in list_side_files(source):
        side_files.copy(file, target / file.name)


def check_side_files(source: Path) -> list[str]:
    """The files that will not be copied and why, a line each, for a check before a run. Raises as `copy_side_files`."""
    return [reason for file in list_side_files(source) if (reason := side_files.check(file))]


def list_side_files(source: Path) -> list[Path]:
    """The files beside the weights, sorted. Raises ValueError when there is no config.json."""
    if not (source / "config.json").is_file():
        raise ValueError(f"{source}: no config.json")
    others = {file for pattern in _NOT_SIDE_FILES for file in source.glob(pattern)}
    return [file for file in sorted(source.iterdir()) if file.suffix in _SIDE_FILES and file not in others]


def _write_tensors(tensors: Iterable[tuple[str, Tensor]], folder: Path, max_bytes: int) -> torch.dtype:
    """Writes the safetensors files and, when there are several, their index. Returns the dtype of the tensors."""
    files: list[list[str]] = []
    waiting: dict[str, Tensor] = {}
    total = size = 0
    for name, tensor in tensors:
        if waiting and size + tensor.nbytes > max_bytes:
            files.append(_write_file(waiting, folder, len(files)))
            waiting, size = {}, 0
        waiting[name] = tensor.detach().cpu().contiguous()
        size, total, dtype = size + tensor.nbytes, total + tensor.nbytes, tensor.dtype
    files.append(_write_file(waiting, folder, len(files)))
    final = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    if len(files) == 1:
        final = [WEIGHTS_FILE]
    for number, name in enumerate(final):
        (folder / _numbered(number)).rename(folder / name)
    if len(files) > 1:
        weight_map = {tensor: file for file, names in zip(final, files) for tensor in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    return dtype


def _numbered(number: int) -> str:
    return f"part-{number}.safetensors"


def _write_file(tensors: dict[str, Tensor], folder: Path, number: int) -> list[str]:
    file = folder / _numbered(number)
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:  # how the library says that a disk is full
        raise OSError(f"{file}: {error}") from error
    return list(tensors)


def set_dtype(config: Path, dtype: torch.dtype) -> None:
    """Makes config.json name the dtype that was written, since transformers loads in the dtype that it names."""
    tree = read_json(config)
    tree["dtype"] = str(dtype).removeprefix("torch.")
    tree.pop("torch_dtype", None)
    for section in ("text_config", "vision_config"):
        for key in ("dtype", "torch_dtype"):
            if isinstance(tree.get(section), dict) and key in tree[section]:
                tree[section][key] = tree["dtype"]
    config.write_text(json.dumps(tree, indent=2) + "\n")
