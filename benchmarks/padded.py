"""Rollouts as padded batches, the way Hugging Face models read them; for the two baselines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megatron_papo.types import Prompt


def pad_left(rows: Sequence[Tensor], padding: float) -> tuple[Tensor, Tensor]:
    """The rows [B, S], padded on the left, and their mask (int64, 1 where a row has a value)."""
    padded, mask = pad_right([row.flip(0) for row in rows], padding)
    return padded.flip(1), mask.flip(1)


def pad_right(rows: Sequence[Tensor], padding: float) -> tuple[Tensor, Tensor]:
    """The rows [B, S], padded on the right, and their mask (int64, 1 where a row has a value)."""
    mask = pad_sequence([torch.ones_like(row, dtype=torch.int64) for row in rows], batch_first=True)
    return pad_sequence(list(rows), batch_first=True, padding_value=padding), mask


def image_inputs(prompts: Sequence[Prompt], masked: bool = False) -> tuple[Tensor, Tensor]:
    """Pixels [P, D] and grids [I, 3] of all prompts in order, or those of their masked views with `masked`."""
    pixels = [prompt.masked_pixel_values_PD if masked else prompt.inputs.pixel_values_PD for prompt in prompts]
    return torch.cat([one for one in pixels if one is not None]), torch.cat(
        [prompt.inputs.grid_thw_I3 for prompt in prompts if prompt.inputs.grid_thw_I3 is not None]
    )


def without_cuda_mode() -> Any:
    """A context without the torch mode that lets Megatron-Core run without a GPU
    (`megatron_papo.distributed.accelerator`). It would cost sides that do not need it a Python call per operation."""
    return torch._C.DisableTorchFunction()
