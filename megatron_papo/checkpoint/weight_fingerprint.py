"""A fingerprint of the weights in a folder: a short text, the same for a copy of them in any number of files.

For a Hugging Face folder it is computed of the names and shapes of all tensors and the first row of 64 of them; for a
checkpoint of its state.json, which has checksums of the rest. So weights that were changed in a few places may pass as
the same.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open

from megatron_papo.checkpoint.state_file import STATE_FILE, names_checkpoint
from megatron_papo.data.fingerprint import fingerprint
from megatron_papo.weights.weight_files import weight_files

_TENSORS = 64


def fingerprint_of_weights(folder: Path) -> str:
    """The fingerprint of the weights in `folder`. Raises ValueError for a folder without weights, OSError for one that
    cannot be read."""
    if names_checkpoint(folder):
        return fingerprint([(folder / STATE_FILE).read_bytes()])
    shapes: dict[str, list[int]] = {}
    file_of: dict[str, Path] = {}
    for file in weight_files(folder).files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                shapes[name], file_of[name] = tensors.get_slice(name).get_shape(), file
    names = sorted(shapes)
    chosen = names[:: -(-len(names) // _TENSORS)]
    rows = []
    for name in chosen:
        with safe_open(file_of[name], framework="pt") as tensors:
            rows.append(tensors.get_slice(name)[:1].contiguous().view(torch.uint8).numpy().tobytes())
    return fingerprint([json.dumps(shapes, sort_keys=True).encode(), *rows])
