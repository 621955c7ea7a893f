"""How far a row of one long sequence may go beyond `train.tokens_per_micro_batch`. Imports no torch."""

from __future__ import annotations

from megatron_papo.config import Config
from megatron_papo.costs.memory import RESERVE_BYTES, gpu_bytes, stage_memory
from megatron_papo.model.shape import ModelShape

_MOST = 2
"""A row has at most so many times the budget, whatever would fit: its step takes as much longer."""
_STEPS = 8
"""Lengths between the budget and its multiple that are tried."""


def longest_row(config: Config, shape: ModelShape, num_ranks: int, *, on_gpus: bool) -> int:
    """Most tokens of a row, all views counted: the same on all ranks, which know the same settings.

    It is twice the budget; on GPUs less where the estimate of an update's memory (costs/memory.py, for the GPUs that
    the section `cluster` describes) says that less fits beside the reserve, and the budget where rows have one length.
    """
    budget = config.train.tokens_per_micro_batch
    if config.train.fixed_rows:
        return budget
    has = gpu_bytes(config) if on_gpus else None
    if has is None:
        return _MOST * budget
    for step in range(_STEPS, 0, -1):
        tokens = budget + budget * (_MOST - 1) * step // _STEPS
        train = config.train.model_copy(update={"tokens_per_micro_batch": tokens})
        stages = stage_memory(config.model_copy(update={"train": train}), shape, num_ranks)
        if all(stage.updating <= has - RESERVE_BYTES for stage in stages):
            return tokens
    return budget
