"""A few prompts in full: the text that the tokenizer is given, the pictures as the model sees them, and masked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from PIL import Image
from torch import Tensor

from megatron_papo.data.processor import Processor
from megatron_papo.data_report.findings import DataSurvey, MeasuredRow
from megatron_papo.data_report.reading import OpenedData
from megatron_papo.generation.engine_images import pictures
from megatron_papo.types import Prompt

_MOST_EXAMPLES = 4
_MOST_PICTURES = 8


@dataclass(frozen=True)
class Piece:
    """A part of a prompt's text: a special token, which may stand several times in a row, or what is between two."""

    text: str
    is_special: bool
    times: int = 1


@dataclass(frozen=True)
class Example:
    """A row as the trainer sees it."""

    measured: MeasuredRow
    pieces: tuple[Piece, ...]
    """The whole prompt, up to where the answer begins."""
    pictures: tuple[Image.Image, ...]
    """Of the first pictures, what the model sees."""
    masked: tuple[Image.Image, ...]
    """The same masked; empty where the verb masks nothing."""
    response: str | None
    """The demonstration."""


def examples_of(rows: OpenedData, survey: DataSurvey) -> list[Example]:
    """The first good row with a picture, else the first good row, of each source; of a few sources."""
    chosen: dict[str, MeasuredRow] = {}
    for measured in survey.good:
        before = chosen.get(measured.source)
        if before is None or (measured.sizes and not before.sizes):
            chosen[measured.source] = measured
    return [_example(rows, measured) for measured in list(chosen.values())[:_MOST_EXAMPLES]]


def _example(rows: OpenedData, measured: MeasuredRow) -> Example:
    prompt = rows.shown.prompt(measured.row, rows.masks)
    seen, masked = prompt.inputs.pixel_values_PD, prompt.masked_pixel_values_PD
    column = rows.response_column
    return Example(
        measured,
        tuple(_pieces(prompt, rows.processor)),
        _pictures(prompt, seen, rows.processor),
        _pictures(prompt, masked, rows.processor),
        None if column is None else str(rows.shown.column(measured.row, column)),
    )


def _pictures(prompt: Prompt, pixel_values_PD: Tensor | None, processor: Processor) -> tuple[Image.Image, ...]:
    grid_thw_I3 = prompt.inputs.grid_thw_I3
    if pixel_values_PD is None or grid_thw_I3 is None:
        return ()
    grid_thw_I3 = grid_thw_I3[:_MOST_PICTURES]
    num_patches = int(grid_thw_I3.prod(dim=1).sum())
    return tuple(pictures(pixel_values_PD[:num_patches], grid_thw_I3, processor.image_processor))


def _pieces(prompt: Prompt, processor: Processor) -> Iterator[Piece]:
    """The text that the token ids stand for, so nothing of it is what somebody believes that the template writes."""
    tokenizer = processor.tokenizer
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    for key, run in groupby(prompt.inputs.token_ids_S.tolist(), lambda token: token if token in special else None):
        ids = list(run)
        if key is None:
            yield Piece(tokenizer.decode(ids), False)
        else:
            yield Piece(str(tokenizer.convert_ids_to_tokens(key)), True, len(ids))
