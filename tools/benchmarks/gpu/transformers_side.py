"""The other side of an update: PAPO in plain PyTorch on a transformers model of the same weights, as it fits."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from megatron_papo.accelerator import device, has_gpu, parameter_dtype
from megatron_papo.model.shape import ModelShape
from megatron_papo.types import Group
from tools.benchmarks.gpu.folder import drawn_tensors
from tools.benchmarks.gpu.rows import Options, reason_of, release
from tools.benchmarks.ours import Ours
from tools.benchmarks.plain_papo import PlainPapo

_SEQUENCES = {"3b": 4, "tiny": 2}
"""Rollouts of a forward, at most: in the other benchmarks 2 to 8 are as fast."""
_CHECKPOINTED = 2
_PLAIN_BYTES = 8
"""A parameter, with gradient and two moments, all in bfloat16."""
_OUR_BYTES = 18
"""A parameter in bfloat16, its gradient, master copy and two moments in fp32."""
_ROOM = 0.7
"""Of a GPU, for states; the rest is for activations."""


def open_plain(folder: Path, options: Options) -> PlainPapo:
    """Its attention the fastest that is installed; Adam in the dtype of the weights."""
    shape, dtype = ModelShape.from_folder(folder / "model"), parameter_dtype("auto")
    config = Qwen2_5_VLConfig.from_pretrained(folder / "model", local_files_only=True)
    with torch.device(device()):
        make = Qwen2_5_VLForConditionalGeneration._from_config
        model = make(config, dtype=dtype, attn_implementation=_attention())
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in drawn_tensors(shape, dtype):
            own[name].copy_(tensor)
    return PlainPapo(model, _SEQUENCES[options.shape])


def fit_plain(plain: PlainPapo, groups: Sequence[Group]) -> str:
    """Sets the number of sequences to the largest that fits, with gradient checkpointing where none does; how it runs.

    Raises torch.OutOfMemoryError when that does not fit either.
    """
    while plain.sequences and not _fits(plain, groups):
        plain.sequences //= 2
    name = f"transformers, {_attention()}"
    if plain.sequences:
        return f"{name}, {plain.sequences} sequences"
    plain.model.gradient_checkpointing_enable()
    plain.sequences = _CHECKPOINTED
    return f"{name}, {plain.sequences} sequences, checkpointing"


def fits_both(ours: Ours) -> bool:
    """Whether the device holds both sides' states at a time."""
    if not has_gpu():
        return True
    num_parameters = sum(parameter.numel() for parameter in ours.run.policy.parameters())
    return num_parameters * (_OUR_BYTES + _PLAIN_BYTES) < _ROOM * torch.cuda.mem_get_info()[1]


def _fits(plain: PlainPapo, groups: Sequence[Group]) -> bool:
    """Two updates of one group: the first makes the moments."""
    try:
        for _ in range(2):
            plain.update("PAPO joint", groups[:1])
    except torch.OutOfMemoryError as error:
        reason_of(error)
        plain.optimizer.zero_grad()
        release()
        return False
    return True


def _attention() -> str:
    flash = has_gpu() and importlib.util.find_spec("flash_attn") is not None
    return "flash_attention_2" if flash else "sdpa"
