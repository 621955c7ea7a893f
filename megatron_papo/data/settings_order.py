"""The order of rows that the settings ask for: one function gives the rows of an epoch, whatever they combine.

An epoch begins with what `data.sampler` gives, or else with all rows, as often as the weights of their sources say. A
stage of `data.curriculum` leaves out those that it does not draw from. Without a sampler `data.shuffle` then shuffles
them, and `data.order_by` sorts them, equal values staying as they were.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from megatron_papo.config import DataConfig
from megatron_papo.data.dataset import PromptDataset
from megatron_papo.data.epochs import EpochRows, RowOrder, Stage, rows_as_they_are, shuffled_rows
from megatron_papo.data.order import DataCursor
from megatron_papo.data.samplers import sampler_of


def first_cursor(data: DataConfig, dataset: PromptDataset, seed: int, prompts_per_step: int) -> DataCursor:
    """The beginning of the order in which `dataset` is drawn, `prompts_per_step` over all ranks.

    Raises ValueError naming the setting that cannot be.
    """
    special = None
    if data.order_by is not None or data.sampler is not None or data.curriculum or not dataset.mixture.is_plain:
        special = RowOrder(_stages(data, dataset, prompts_per_step), _epoch_rows(data, dataset, seed))
    return DataCursor(len(dataset), seed, data.shuffle, special=special)


def _stages(data: DataConfig, dataset: PromptDataset, prompts_per_step: int) -> list[Stage]:
    if not data.curriculum:
        return [Stage(np.arange(len(dataset)))]
    return [
        Stage(
            dataset.rows_passing(stage.filter, f"data.curriculum[{number}].filter"),
            stage.epochs,
            None if stage.steps is None else stage.steps * prompts_per_step,
        )
        for number, stage in enumerate(data.curriculum)
    ]


def _epoch_rows(data: DataConfig, dataset: PromptDataset, seed: int) -> EpochRows:
    if data.sampler is not None:
        sampled = sampler_of(data.sampler, len(dataset), seed, dataset.column_values)
        return lambda epoch, rows: (given := sampled(epoch))[np.isin(given, rows)]
    mixture, arranged = dataset.mixture, shuffled_rows(seed) if data.shuffle else rows_as_they_are
    ranks = None if data.order_by is None else _ranks(data.order_by, dataset, data.order_descending)

    def rows_of(epoch: int, rows: np.ndarray) -> np.ndarray:
        rows = arranged(epoch, mixture.epoch_rows(rows, seed, epoch))
        return rows if ranks is None else rows[np.argsort(ranks[rows], kind="stable")]

    return rows_of


def _ranks(column: str, dataset: PromptDataset, descending: bool) -> np.ndarray:
    """The place of each row's value among all values of the column, [N] int64: equal for equal values, the largest for
    rows without a value."""
    values = dataset.column_values(column, "data.order_by")
    known = [value for value in values if not _is_missing(value)]
    if not known:
        raise ValueError(f"data.order_by: no row has a value in column {column!r}")
    try:
        order = sorted(set(known), reverse=descending)
    except TypeError:  # a list, or a text among numbers
        kinds = ", ".join(sorted({type(value).__name__ for value in known}))
        raise ValueError(f"data.order_by: column {column!r} holds values that have no order ({kinds})") from None
    ranks = {value: rank for rank, value in enumerate(order)}
    return np.array([len(order) if _is_missing(value) else ranks[value] for value in values])


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
