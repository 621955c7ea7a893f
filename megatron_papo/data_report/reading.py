"""Reads the rows of a data set as the trainer would, by several threads, and measures each."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_papo.config import Config
from megatron_papo.data.bad_rows import BadRow
from megatron_papo.data.dataset import PromptDataset
from megatron_papo.data.images import image_size
from megatron_papo.data.masking import Masks
from megatron_papo.data.processor import Processor
from megatron_papo.data.processor_files import read_processor
from megatron_papo.data_report.findings import DataSurvey, MeasuredRow
from megatron_papo.data_report.measuring import MeasuringProcessor

_MOST_THREADS = 16
_ROWS_AT_ONCE = 512
"""Rows that are under way; of each no more is kept than its numbers."""
_PLAIN_EVERY_S = 10.0
"""Where the output is no terminal, a line is printed this often."""


@dataclass(frozen=True)
class OpenedData:
    """The data set of a verb twice: as it is measured, and as the trainer sees it."""

    verb: str
    which: Literal["train", "eval"]
    measured: PromptDataset
    shown: PromptDataset
    processor: Processor
    """That of `shown`, which makes pixels."""
    measuring: MeasuringProcessor
    masks: Masks | None
    """What masks the pictures; None for a verb that masks none."""
    response_column: str | None
    """Of the demonstrations, where the verb learns some."""


def open_rows(config: Config, verb: str, folder: Path) -> OpenedData:
    """Opens the data set with the processor of the model folder. Raises ValueError."""
    which: Literal["train", "eval"] = "eval" if verb == "eval" else "train"
    files = read_processor(folder)
    processor, measuring = Processor(files, folder, config.data), MeasuringProcessor(files, folder, config.data)
    _ = measuring.form, measuring.end_of_turn_id, measuring.most_letters_of_a_token  # before threads ask for them
    column = config.sft.response_column if verb == "sft" else None
    masks = None if verb == "sft" else Masks(config.perception.mask, config.run.seed)
    measured, shown = (_dataset(config, verb, which, each) for each in (measuring, processor))
    return OpenedData(verb, which, measured, shown, processor, measuring, masks, column)


def _dataset(config: Config, verb: str, which: Literal["train", "eval"], processor: Processor) -> PromptDataset:
    if verb == "sft":
        from megatron_papo.sft import Demonstrations  # with the trainer behind it: slow to import

        return Demonstrations(config, processor)
    return PromptDataset(config.data, which, processor)


def read_rows(rows: OpenedData, limit: int | None) -> DataSurvey:
    """Measures every row, or `limit` of them at even distances, and shows how far it is."""
    total = len(rows.measured)
    number = min(limit or total, total)
    start, good, bad = time.monotonic(), list[MeasuredRow](), list[BadRow]()
    with _progress(f"rows of data.{rows.which}", number) as advance:
        for found in _in_order(rows, [place * total // number for place in range(number)]):
            if isinstance(found, BadRow):
                bad.append(found)
            else:
                good.append(found)
            advance()
    seconds = time.monotonic() - start
    return DataSurvey(
        verb=rows.verb,
        which=rows.which,
        name=rows.measured.name,
        num_rows=total,
        num_read=number,
        good=good,
        bad=bad,
        sources_of_bad=[rows.measured.source_name(each.row) for each in bad],
        pixel_bounds=rows.processor.pixel_bounds,
        seconds=seconds,
    )


def _in_order(rows: OpenedData, numbers: Sequence[int]) -> Iterator[MeasuredRow | BadRow]:
    """What each row is, in the order of `numbers`, with some rows under way at a time."""
    waiting = iter(numbers)
    with ThreadPoolExecutor(min(_MOST_THREADS, len(os.sched_getaffinity(0)))) as pool:
        while chunk := list(islice(waiting, _ROWS_AT_ONCE)):
            yield from pool.map(partial(_measure, rows), chunk)


def _measure(rows: OpenedData, row: int) -> MeasuredRow | BadRow:
    processor = rows.measuring
    try:
        prompt = rows.measured.prompt(row)
    except BadRow as bad:
        return bad
    grid_thw_I3 = prompt.inputs.grid_thw_I3
    patches = [] if grid_thw_I3 is None else grid_thw_I3.prod(dim=1).tolist()
    response: Any = None if rows.response_column is None else rows.measured.column(row, rows.response_column)
    return MeasuredRow(
        row=row,
        source=prompt.source,
        num_tokens=prompt.inputs.token_ids_S.numel(),
        image_tokens=tuple(number // processor.merge_size**2 for number in patches),
        sizes=tuple(map(image_size, prompt.images)),
        seen_pixels=tuple(number * processor.patch_size**2 for number in patches),
        answers=tuple(filter(None, prompt.answers)),
        digest=_digest(prompt.problem.encode("utf-8", "surrogatepass"), *prompt.images),
        response_tokens=None if response is None else len(processor.encode_response(response)),
    )


def _digest(*parts: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()


class _Advance(Protocol):
    def __call__(self) -> None: ...


@contextmanager
def _progress(what: str, total: int) -> Iterator[_Advance]:
    """Shows on standard error how many of `total` are done, as a bar or, where that is no terminal, now and then a
    line."""
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda: bar.advance(task)
        return
    start = time.monotonic()
    done, next_line = 0, start + _PLAIN_EVERY_S

    def advance() -> None:
        nonlocal done, next_line
        done += 1
        if time.monotonic() >= next_line:
            next_line = time.monotonic() + _PLAIN_EVERY_S
            print(
                f"papo: data: {done} of {total} {what} ({time.monotonic() - start:.0f} s)", file=sys.stderr, flush=True
            )

    yield advance
