"""Which prompts a certificate is made of: the first rows of the data that have images, else the first rows."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from megatron_papo.config import Config
from megatron_papo.data.bad_rows import BadRow
from megatron_papo.data.dataset import PromptDataset
from megatron_papo.data.processor import Processor
from megatron_papo.types import Prompt

_ROWS_LOOKED_AT = 4096
"""For images, from the first on."""
_VISIT = -1
"""Enters the seeds of the answers: no draw of training has it."""


def prompts_to_certify(config: Config, processor: Processor) -> list[Prompt]:
    """`certify.prompts` of data.train, the same on every rank. Raises ValueError when no row is good."""
    dataset = PromptDataset(config.data, "train", processor)
    found = list(islice(_prompts(dataset, with_images=True), config.certify.prompts))
    found = found or list(islice(_prompts(dataset, with_images=False), config.certify.prompts))
    if not found:
        raise ValueError(f"data.train: none of the first {_ROWS_LOOKED_AT} rows can be a prompt")
    return found


def _prompts(dataset: PromptDataset, *, with_images: bool) -> Iterator[Prompt]:
    """Good rows in the order of the data. A picture that a prompt holds twice an engine may encode once: left out."""
    for row in range(min(len(dataset), _ROWS_LOOKED_AT)):
        try:
            images = dataset.images(row)
            if bool(images) == with_images and len(set(images)) == len(images):
                yield dataset.prompt(row, visit=_VISIT)
        except BadRow:
            continue
