"""Loads weights, without an optimizer, from the folder that a user names: a Hugging Face folder or a checkpoint."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from megatron_papo.checkpoint.state import TrainState, read_state
from megatron_papo.checkpoint.state_file import names_checkpoint
from megatron_papo.model.shape import ModelShape
from megatron_papo.weights.huggingface_folder import find_weights
from megatron_papo.weights.transfer import Progress, read_hf


def check_weights(shape: ModelShape, folder: Path | str) -> None:
    """Raises ValueError for a Hugging Face folder whose tensors, by their headers, do not have the `shape`. So a wrong
    config.json is noticed before memory is allocated by it. A checkpoint is not checked here."""
    if not names_checkpoint(folder):
        find_weights(Path(folder), shape).check(shape)


def load_weights(model: nn.Module, shape: ModelShape, folder: Path | str, progress: Progress | None = None) -> None:
    """Fills this rank's shards from `folder`. Raises ValueError, on every rank, for what does not fit.

    `progress` is called for Hugging Face tensors only; a checkpoint is read in one step.
    """
    if names_checkpoint(folder):
        read_state(folder, TrainState(model, shape))
    else:
        read_hf(model, shape, folder, progress)
