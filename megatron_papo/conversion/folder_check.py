"""A cheap look at Hugging Face folders before they are converted, verified or compared: the safetensors library's own
reading beside ours, which the conversion goes by.

Names, shapes and types of all tensors, and the first and the last row of each. That the files are those that
transformers reads is a rule (`weight_files.py`), which a test compares with transformers itself: importing it here
would take longer than most conversions.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from megatron_papo.checkpoint.state_file import names_checkpoint
from megatron_papo.conversion.stores import Files, view
from megatron_papo.conversion.workers import Workers
from megatron_papo.model.shape import ModelShape
from megatron_papo.weights.huggingface_folder import find_weights
from megatron_papo.weights.safetensors_header import Stored


def look(workers: Workers, *folders: Path) -> None:
    """By the first worker. Raises ValueError naming the tensor that the library reads otherwise."""
    workers.first(lambda: _look([folder for folder in folders if not names_checkpoint(folder)]))


def _look(folders: list[Path]) -> int:
    """How many tensors were looked at."""
    return sum(_look_at(folder) for folder in folders)


def _look_at(folder: Path) -> int:
    weights = find_weights(folder, ModelShape.from_folder(folder))
    with Files(folder) as files:
        for name, stored in weights.tensors.items():
            try:
                agrees = _agrees(files, folder / stored.file, weights.written[name], stored)
            except SafetensorError:
                agrees = False
            if not agrees:
                raise ValueError(f"{folder / stored.file}: {name}: the safetensors library reads it otherwise")
    return len(weights.tensors)


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
