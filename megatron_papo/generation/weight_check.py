"""What an engine is handed: the model's settings as transformers reads them, then every tensor once, checked by its
shape and transformers' name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

Shapes = Mapping[str, tuple[int, ...]]

_NAMED_FAULTS = 10


def read_config(folder: Path) -> Qwen2_5_VLConfig:
    """transformers' settings of the folder, which is not trusted: no code of its own, no attention kernel that it
    names, no look at the hub. Raises ValueError."""
    try:
        config = Qwen2_5_VLConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        config._attn_implementation = "sdpa"  # of all parts: the name of a repository would be fetched and run
        return config
    except Exception as error:  # of any type, by the key that transformers stumbles over
        reason = str(error).strip().splitlines() or [""]
        raise ValueError(f"{folder}/config.json: {type(error).__name__}: {reason[0]}") from error


def expected_shapes(config: Qwen2_5_VLConfig) -> Shapes:
    """Names as transformers' modules have them -> shapes. A tied head is left out: the embedding is the head."""
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def checked(named_tensors: Iterator[tuple[str, Tensor]], expected: Shapes) -> Iterator[tuple[str, Tensor]]:
    """The fitting tensors; consumes `named_tensors` to its end whatever it finds.

    Raises ValueError at the end, naming what is missing, unknown, repeated or misshapen: other ranks draw from the
    same collectives, so stopping half-way would leave them hanging.
    """
    faults, seen = [], set()
    for name, tensor in named_tensors:
        if name not in expected:
            faults.append(f"{name}: unknown")
        elif name in seen:
            faults.append(f"{name}: handed over twice")
        elif expected[name] != tuple(tensor.shape):
            faults.append(f"{name}: is {tuple(tensor.shape)}, expected {expected[name]}")
        else:
            yield name, tensor
        seen.add(name)
    faults += [f"{name}: missing" for name in expected if name not in seen]
    if faults:
        more = f" and {len(faults) - _NAMED_FAULTS} more" if len(faults) > _NAMED_FAULTS else ""
        raise ValueError("weights handed to the generator: " + "; ".join(faults[:_NAMED_FAULTS]) + more)
