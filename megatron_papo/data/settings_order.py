"""The order of rows that the settings ask for: one function gives the rows of an epoch, whatever they combine.

`data.sampler`, or else `data.shuffle` and then `data.order_by`, whose equal values stay as they were.
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


def first_cursor(data: DataConfig, dataset: PromptDataset, seed: int) -> DataCursor:
    """The beginning of the order in which `dataset` is drawn. Raises ValueError naming the setting that cannot be."""
    num_rows = len(dataset)
    special = None
    if data.order_by is not None or data.sampler is not None:
        special = RowOrder([Stage(np.arange(num_rows))], _epoch_rows(data, dataset, seed))
    return DataCursor(num_rows, seed, data.shuffle, special=special)


def _epoch_rows(data: DataConfig, dataset: PromptDataset, seed: int) -> EpochRows:
    if data.sampler is not None:
        sampled = sampler_of(data.sampler, len(dataset), seed, dataset.column_values)
        return lambda epoch, rows: sampled(epoch)
    mixed = shuffled_rows(seed) if data.shuffle else rows_as_they_are
    if data.order_by is None:
        return mixed
    ranks = _ranks(data.order_by, dataset, data.order_descending)

    def sorted_rows(epoch: int, rows: np.ndarray) -> np.ndarray:
        rows = mixed(epoch, rows)
        return rows[np.argsort(ranks[rows], kind="stable")]

    return sorted_rows


def _ranks(column: str, dataset: PromptDataset, descending: bool) -> np.ndarray:
    """The place of each row's value among all values of the column, [N] int64: equal for equal values, the largest for
    rows without a value."""
    values = dataset.column_values(column)
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
