"""The other side of an update: PAPO in plain PyTorch on a transformers model of the same weights, as it fits."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu.folder import drawn_tensors
from benchmarks.plain_papo import PlainPapo
from megatron_papo.distributed.accelerator import device, has_gpu, parameter_dtype
from megatron_papo.generation.reference_model import classes_of, read_config
from megatron_papo.model.family import family_of
from megatron_papo.model.shape import ModelShape
from megatron_papo.types import Group


@dataclass(frozen=True)
class Size:
    """How the plain side runs."""

    sequences: int
    """Rollouts of a forward."""
    checkpointing: bool = False

    @property
    def name(self) -> str:
        return f"transformers, {_attention()}, {self.sequences} sequences" + ", checkpointing" * self.checkpointing


TINY_SIZES = (Size(2),)
SIZES = (Size(4), Size(2), Size(1), Size(2, checkpointing=True))
"""What is tried of a published model, one after the other until it fits: in the other benchmarks 2 to 8 rollouts are as
fast. Of a small model it always does."""


def open_plain(folder: Path, size: Size) -> PlainPapo:
    """Its attention the fastest that is installed; Adam in the dtype of the weights."""
    shape, dtype = ModelShape.from_folder(folder / "model"), parameter_dtype("auto")
    family = family_of(shape)
    config = read_config(folder / "model", family)
    with torch.device(device()):
        make = classes_of(family).MODEL_CLASS._from_config
        model = make(config, dtype=dtype, attn_implementation=_attention())
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in drawn_tensors(shape, dtype):
            own[name].copy_(tensor)
    if size.checkpointing:
        model.gradient_checkpointing_enable()
    return PlainPapo(model, size.sequences)


def try_out(plain: PlainPapo, groups: Sequence[Group]) -> None:
    """Two updates of one group, of which the first makes the moments. Raises torch.OutOfMemoryError where that does not
    fit the GPU."""
    for _ in range(2 if has_gpu() else 0):
        plain.update("PAPO joint", groups[:1])


def _attention() -> str:
    flash = has_gpu() and importlib.util.find_spec("flash_attn") is not None
    return "flash_attention_2" if flash else "sdpa"
