"""Rows of a dataset as prompts, each checked when it is drawn.

Columns `problem`, `answer`, `images`, under names of your own (`columns.py`). `<image>` in a problem says where a
picture belongs; without any the pictures come first, as TRL has it. A row that cannot be a prompt raises BadRow with
its number and the reason; what then happens is for `draw` to decide.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import Any, Literal

import numpy as np
from PIL import Image

from megatron_papo.config import DataConfig
from megatron_papo.config.data_sources import names_sources, source_key
from megatron_papo.data.bad_rows import BadRow
from megatron_papo.data.cells import BadCell, answers_of, question_of, system_of
from megatron_papo.data.chat_template import TemplateFailed
from megatron_papo.data.conversation import PLACEHOLDER
from megatron_papo.data.fingerprint import fingerprint
from megatron_papo.data.image_files import BadImage
from megatron_papo.data.images import decode_image, image_bytes
from megatron_papo.data.masking import Masks, mask_images, mask_random, spoil_image, with_masked
from megatron_papo.data.mixture import Mixture
from megatron_papo.data.processor import ImageTooExtreme, Pixels, Processor
from megatron_papo.data.source_rows import SourceRows
from megatron_papo.files.video_cells import ONLY_PICTURES, video_column
from megatron_papo.text.untrusted import shortened
from megatron_papo.types import Prompt

Spoiler = Callable[[Image.Image], Image.Image]


@contextmanager
def _as_bad_row(row: int) -> Iterator[None]:
    """What goes wrong with the row's own values is BadRow: a row is not trusted to fit memory or recursion either."""
    try:
        yield
    except (BadCell, BadImage) as error:
        raise BadRow(row, error.reason, str(error)) from None
    except ImageTooExtreme as error:
        raise BadRow(row, "image too extreme", str(error)) from None
    except TemplateFailed as error:
        raise BadRow(row, "chat template", str(error)) from None
    except MemoryError:
        raise BadRow(row, "out of memory") from None
    except RecursionError:
        raise BadRow(row, "nested too deep") from None


class PromptDataset:
    """`data.train` or `data.eval`, row by row: the rows of all its sources, one behind the other, numbered from 0.

    `needs_answer=False` for scoring and supervision, where none is read.
    """

    def __init__(
        self, data: DataConfig, which: Literal["train", "eval"], processor: Processor, *, needs_answer: bool = True
    ) -> None:
        entries, written = data.sources(which), data.train if which == "train" else data.eval
        if written is None:
            raise ValueError(f"data.{which}: not set")
        keys = [source_key(which, written, place) for place in range(len(entries))]
        self.which, self._processor, self._needs_answer = which, processor, needs_answer
        self._max_tokens, self._max_pixels = data.max_prompt_tokens, data.max_image_pixels
        self.sources = tuple(
            SourceRows(data, entry, key, needs_answer=needs_answer) for entry, key in zip(entries, keys, strict=True)
        )
        """The sources in their order, with the rows of each."""
        self.name = shortened(", ".join(source.origin for source in self.sources), 400)
        self._ends = list(accumulate(map(len, self.sources)))
        self._names_sources = names_sources(written)

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def mixture(self) -> Mixture:
        """How often the rows of each source are drawn."""
        return Mixture(tuple(map(len, self.sources)), tuple(source.config.weight for source in self.sources))

    def locate(self, row: int) -> tuple[SourceRows, int]:
        """The source of a row, and the row's number among the rows of that source."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        place = bisect_right(self._ends, row)
        return self.sources[place], row - (self._ends[place - 1] if place else 0)

    def source_name(self, row: int) -> str:
        """The source by which the metrics of a row are told apart; empty where they are not."""
        if not self._names_sources:
            return ""
        source, own = self.locate(row)
        column = source.config.source_column
        return source.source_of({} if column is None else source.rows.select_columns([column])[own])

    def first_rows(self, limit: int | None) -> list[int]:
        """The first `limit` rows (None: all), of several sources the first of each, in proportion to their sizes."""
        total = len(self)
        limit = min(limit or total, total)
        firsts = [(end - len(source), len(source)) for source, end in zip(self.sources, self._ends, strict=True)]
        return [
            row
            for first, size in firsts
            for row in range(first, first + (limit * (first + size) // total - limit * first // total))
        ]

    @contextmanager
    def named(self, row: int) -> Iterator[None]:
        """A BadRow from within says where the row lies: its source where there are several, its number in the file."""
        try:
            with _as_bad_row(row):
                yield
        except BadRow as bad:
            source, own = self.locate(row)
            told = f"{source.key}: {source.origin}" if len(self.sources) > 1 else ""
            bad.lies_in(told, source.number_in_file(own))
            raise

    def prompt(self, row: int, masks: Masks | None = None, visit: int = 0) -> Prompt:
        """The row as the model reads it, and with `masks` also its masked view at this `visit`; raises BadRow.

        What costs least is looked at first, and pictures are decoded one at a time, once for both views, and not kept:
        a batch of them would fill the host's memory.
        """
        source, own_row = self.locate(row)
        with self.named(row):
            cells = source.rows[own_row]
            items = source.pictures(cells)
            problem, system = self._question(source, row, cells, len(items))
            answers = self._answers(source, row, cells)
            if problem.count(PLACEHOLDER) != len(items):
                placeholders = problem.count(PLACEHOLDER)
                raise BadRow(row, "placeholder count", f"{placeholders} {PLACEHOLDER} for {len(items)} images")
            if token := self._processor.vision_token_in(problem + (system or "")):
                raise BadRow(row, "vision token in text", token)
            text_ids_S = self._processor.text_ids(problem, len(items), system)
            self._check_length(row, text_ids_S.numel())
            compressed = image_bytes(items, source.images, self._max_pixels)
            prompt_id = f"{self.which}:{row}"
            pixels, masked = self._views(row, visit, prompt_id, compressed, text_ids_S.numel(), masks)
            inputs = self._processor.join(text_ids_S, pixels)
            prompt = Prompt(
                prompt_id, row, problem, answers[0], compressed, inputs, visit=visit, other_answers=answers[1:],
                source=source.source_of(cells) if self._names_sources else "", columns=source.other_cells(cells),
                system=system,
            )  # fmt: skip
            if masked:
                return with_masked(prompt, masked)
            return prompt if masks is None else mask_images(prompt, masks, self._processor, self)

    def images(self, row: int) -> tuple[bytes, ...]:
        """Compressed images of a row; raises BadRow when one cannot be read."""
        source, own_row = self.locate(row)
        with self.named(row):
            return image_bytes(source.pictures(source.rows[own_row]), source.images, self._max_pixels)

    def decoded(self, data: bytes) -> Image.Image:
        """A picture of this dataset, RGB; raises BadImage."""
        return decode_image(data, self._max_pixels)

    def column(self, row: int, name: str) -> Any:
        """Any other cell of the row, e.g. the response that supervision reads; ValueError for an unknown column."""
        source, own_row = self.locate(row)
        return source.column(own_row, name)

    def column_values(self, name: str, key: str | None = None) -> list[Any]:
        """The cells of a column, a value for each row; ValueError for a column that a source does not have, which the
        setting `key` names (None: the source's)."""
        return [value for source in self.sources for value in source.column_values(name, key)]

    def rows_passing(self, conditions: Mapping[str, Any] | str | None, key: str) -> np.ndarray:
        """The numbers of the rows that pass a filter, ascending, [N] int64; `key` is its setting, for messages. Raises
        ValueError for a filter that cannot be asked, and where no row passes."""
        if conditions is None:
            return np.arange(len(self))
        passing = [source.rows_passing(conditions, key) for source in self.sources]
        firsts = [end - len(source) for source, end in zip(self.sources, self._ends, strict=True)]
        numbers = [first + row for first, rows in zip(firsts, passing, strict=True) for row in rows]
        if not numbers:
            raise ValueError(f"{key}: none of the {len(self)} rows of {self.name} passes")
        return np.array(numbers)

    def without_pictures(self) -> str | None:
        """Why this seems to be a data set of text alone, in words; None where a row has a picture."""
        reasons = []
        for source in self.sources:
            if (reason := source.without_pictures()) is None:
                return None
            reasons.append(reason)
        return "; ".join(reasons)

    def fingerprints(self, more_columns: Sequence[str] = ()) -> dict[str, str]:
        """Fingerprints of what is read of the rows, cells of `more_columns` included; see `fingerprint.py`."""
        each = [
            source.fingerprints(more_columns, partial(self._images_of, end - len(source)))
            for source, end in zip(self.sources, self._ends, strict=True)
        ]
        return (
            each[0] if len(each) == 1 else {part: fingerprint(one[part].encode() for one in each) for part in each[0]}
        )

    def _images_of(self, first: int, row: int) -> tuple[bytes, ...]:
        """The images of row `row` of the source that begins at row `first`."""
        return self.images(first + row)

    def _question(self, source: SourceRows, row: int, cells: dict[str, Any], num_images: int) -> tuple[str, str | None]:
        """The question, with a `<image>` for each picture, and the row's own system turn."""
        problem, told = question_of(cells[source.columns.problem])
        system = system_of(source.system(cells), told)
        if where := video_column(cells, source.columns.images):
            raise BadRow(row, "video", f"{where}: {ONLY_PICTURES}")
        most = self._max_tokens * self._processor.most_letters_of_a_token
        num_letters = len(problem) + len(system or "")
        if num_letters > most:  # tokenising it would take its time
            raise BadRow(row, "prompt too long", f"{num_letters} letters are more than {self._max_tokens} tokens")
        return problem if PLACEHOLDER in problem else PLACEHOLDER * num_images + problem, system

    def _answers(self, source: SourceRows, row: int, cells: dict[str, Any]) -> tuple[str, ...]:
        """One at least; where none is needed it may be empty."""
        try:
            answers = answers_of(cells.get(source.columns.answer), source.answer_feature)
        except BadCell:
            if self._needs_answer:
                raise
            answers = ()
        if self._needs_answer and not answers:
            raise BadRow(row, "no answer")
        return answers or ("",)

    def _check_length(self, row: int, num_tokens: int) -> None:
        if num_tokens > self._max_tokens:
            raise BadRow(row, "prompt too long", f"{num_tokens} tokens, data.max_prompt_tokens is {self._max_tokens}")

    def _views(
        self, row: int, visit: int, prompt_id: str, compressed: Sequence[bytes], num_tokens: int, masks: Masks | None
    ) -> tuple[list[Pixels], list[Pixels]]:
        """Pixels of every picture, and of its masked view where `masks` spoil it as loaded; `num_tokens` without them.

        A row is left at the picture that makes it too long.
        """
        pixels, masked = [], []
        for index, data in enumerate(compressed):
            of_picture, of_masked = self._view(data, self._spoiler(row, visit, prompt_id, index, masks))
            pixels.append(of_picture)
            masked += of_masked
            num_tokens += int(self._processor.num_tokens(of_picture[1])) - 1
            self._check_length(row, num_tokens)
        return pixels, masked

    def _spoiler(self, row: int, visit: int, prompt_id: str, index: int, masks: Masks | None) -> Spoiler | None:
        """What makes the masked view of a picture as loaded."""
        if masks is None or masks.settings.align != "raw":
            return None
        random, mask = mask_random(masks.seed, visit, prompt_id, index), masks.for_patches_of(self._processor).settings
        return partial(spoil_image, row=row, mask=mask, random=random, swap_pool=self)

    def _view(self, data: bytes, spoil: Spoiler | None) -> tuple[Pixels, list[Pixels]]:
        """Pixels of one picture and of its spoiled versions; the decoded picture is released before the next one."""
        image = self.decoded(data)
        pixels = self._processor.pixel_values([image])
        return pixels, [] if spoil is None else [self._processor.pixel_values([spoil(image)])]
