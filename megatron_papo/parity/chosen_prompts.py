"""The prompts of a certificate: the first rows of the data that have images, else the first rows."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from megatron_papo.config import Config
from megatron_papo.data.bad_rows import BadRow, BadRows
from megatron_papo.data.dataset import PromptDataset
from megatron_papo.data.processor import Processor
from megatron_papo.types import Prompt

_ROWS_LOOKED_AT = 4096
"""Rows from the first on, of several sources of each, in which prompts are looked for."""
_VISIT = -1
"""The visit of these prompts, which enters the seeds of their answers; no prompt of training has it."""


def prompts_to_certify(config: Config, processor: Processor) -> list[Prompt]:
    """`certify.prompts` prompts of data.train, the same on every rank. Raises ValueError when no row is good."""
    dataset = PromptDataset(config.data, "train", processor)
    bad_rows = BadRows("skip")
    prompts = list(islice(_prompts(dataset, bad_rows, with_images=True), config.certify.prompts))
    prompts = prompts or list(islice(_prompts(dataset, bad_rows, with_images=False), config.certify.prompts))
    if not prompts:
        looked_at = min(len(dataset), _ROWS_LOOKED_AT)
        raise ValueError(
            f"data.train: none of the first {looked_at} rows of {dataset.name} can be a prompt of a certificate: "
            f"{bad_rows.in_words}"
        )
    return prompts


def _prompts(dataset: PromptDataset, bad_rows: BadRows, *, with_images: bool) -> Iterator[Prompt]:
    """The good rows, in the order of the data, but those that hold a picture twice: an engine may encode it once.
    Notes the others in `bad_rows`."""
    for row in dataset.first_rows(_ROWS_LOOKED_AT):
        try:
            images = dataset.images(row)
            if len(set(images)) < len(images):
                raise BadRow(row, "the same picture twice")
            if bool(images) == with_images:
                yield dataset.prompt(row, visit=_VISIT)
        except BadRow as bad:
            bad_rows.add(bad)
