"""Rows of a dataset as prompts, each checked when it is drawn.

Columns `problem`, `answer`, `images`, under names of your own (`columns.py`). `<image>` in a problem says where a
picture belongs; without any the pictures come first, as TRL has it. A row that cannot be a prompt raises BadRow with
its number and the reason; what then happens is for `draw` to decide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

from PIL import Image

from megatron_papo.config import DataConfig
from megatron_papo.data.bad_rows import BadRow
from megatron_papo.data.cells import BadCell, answers_of, question_of
from megatron_papo.data.chat_template import TemplateFailed
from megatron_papo.data.columns import choose_columns, listed
from megatron_papo.data.conversation import PLACEHOLDER
from megatron_papo.data.fingerprint import fingerprints_of_rows
from megatron_papo.data.image_files import BadImage
from megatron_papo.data.images import decode_image, image_bytes, image_items
from megatron_papo.data.masking import Masks, mask_images, mask_random, spoil_image, with_masked
from megatron_papo.data.processor import ImageTooExtreme, Pixels, Processor
from megatron_papo.data.row_files import missing_columns
from megatron_papo.data.source import open_source
from megatron_papo.types import Prompt

Spoiler = Callable[[Image.Image], Image.Image]

_ROWS_LOOKED_AT = 1024
"""For pictures, spread over the rows."""
_VIDEOS = ("videos", "video")


@contextmanager
def _named(row: int) -> Iterator[None]:
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
    """`data.train` or `data.eval`, row by row. `needs_answer=False` for scoring and supervision, where none is read."""

    def __init__(
        self, data: DataConfig, which: Literal["train", "eval"], processor: Processor, *, needs_answer: bool = True
    ) -> None:
        name = data.train if which == "train" else data.eval
        if name is None:
            raise ValueError(f"data.{which}: not set")
        split = data.split if which == "train" else data.eval_split or data.split
        self.name, self.which, self._key = name, which, f"data.{which}"
        self._processor, self._needs_answer, self._max_tokens = processor, needs_answer, data.max_prompt_tokens
        self._max_pixels, self._system = data.max_image_pixels, data.system
        source = open_source(name, split, self._key, data.image_roots)
        self._rows, self._images = source.rows, source.images
        self._columns = choose_columns(data, name, self._rows.features, needs_answer=needs_answer)
        if fault := missing_columns(source.files, self._read_columns()):
            raise ValueError(f"{self._key}: {fault}")
        self._answer_feature = self._rows.features.get(self._columns.answer)

    def __len__(self) -> int:
        return len(self._rows)

    def prompt(self, row: int, masks: Masks | None = None, visit: int = 0) -> Prompt:
        """The row as the model reads it, and with `masks` also its masked view at this `visit`; raises BadRow.

        What costs least is looked at first, and pictures are decoded one at a time, once for both views, and not kept:
        a batch of them would fill the host's memory.
        """
        with _named(row):
            cells = self._rows[row]
            items = image_items(self._pictures(cells))
            problem, answers = self._problem(row, cells, len(items)), self._answers(row, cells)
            if problem.count(PLACEHOLDER) != len(items):
                placeholders = problem.count(PLACEHOLDER)
                raise BadRow(row, "placeholder count", f"{placeholders} {PLACEHOLDER} for {len(items)} images")
            if token := self._processor.vision_token_in(problem):
                raise BadRow(row, "vision token in text", token)
            text_ids_S = self._processor.text_ids(problem, len(items))
            self._check_length(row, text_ids_S.numel())
            compressed = image_bytes(items, self._images, self._max_pixels)
            prompt_id = f"{self.which}:{row}"
            pixels, masked = self._views(row, visit, prompt_id, compressed, text_ids_S.numel(), masks)
            inputs = self._processor.join(text_ids_S, pixels)
            prompt = Prompt(
                prompt_id, row, problem, answers[0], compressed, inputs, visit=visit, other_answers=answers[1:]
            )
            if masked:
                return with_masked(prompt, masked)
            return prompt if masks is None else mask_images(prompt, masks, self._processor, self)

    def images(self, row: int) -> tuple[bytes, ...]:
        """Compressed images of a row; raises BadRow when one cannot be read."""
        with _named(row):
            return image_bytes(image_items(self._pictures(self._rows[row])), self._images, self._max_pixels)

    def decoded(self, data: bytes) -> Image.Image:
        """A picture of this dataset, RGB; raises BadImage."""
        return decode_image(data, self._max_pixels)

    def column(self, row: int, name: str) -> Any:
        """Any other cell of the row, e.g. the response that supervision reads; ValueError for an unknown column."""
        self._check_column(name)
        return self._rows[row][name]

    def column_values(self, name: str) -> Sequence[Any]:
        """The cells of a column, a value for each row; ValueError for an unknown column."""
        self._check_column(name)
        return self._rows.select_columns([name])[:][name]

    @property
    def lacks_image_column(self) -> bool:
        """Whether the column of pictures is not there, and null has not been said to mean that."""
        return self._columns.images is not None and self._columns.images not in self._rows.column_names

    def without_pictures(self) -> str | None:
        """Why this seems to be a data set of text alone, in words; None where a row has a picture.

        Looks at some of the rows, in their column of pictures alone, and decodes nothing.
        """
        column = self._columns.images
        if column is None:
            return "data.columns.images is null"
        if self.lacks_image_column:
            return f"{self.name} has no column {column!r}"
        cells = self._rows.select_columns([column])
        places = range(0, len(cells), -(-len(cells) // _ROWS_LOOKED_AT))
        if any(image_items(cells[place][column]) for place in places):
            return None
        return f"none of {len(places)} rows of {self.name}, which has {len(cells)}, holds a picture in {column!r}"

    def fingerprints(self, more_columns: Sequence[str] = ()) -> dict[str, str]:
        """Fingerprints of what is read of the rows, cells of `more_columns` included; see `fingerprint.py`."""
        read = (self._columns.problem, self._columns.answer, *more_columns)
        columns = [name for name in dict.fromkeys(read) if name in self._rows.column_names]
        return fingerprints_of_rows(self._rows, columns, self.images)

    def _check_column(self, name: str) -> None:
        if name not in self._rows.column_names:
            raise ValueError(f"{self._key}: {self.name} has no column {name!r}, has {listed(self._rows.features)}")

    def _pictures(self, cells: dict[str, Any]) -> Any:
        return cells.get(self._columns.images) if self._columns.images is not None else None

    def _problem(self, row: int, cells: dict[str, Any], num_images: int) -> str:
        problem = question_of(cells[self._columns.problem], self._system)
        if video := next((name for name in _VIDEOS if name != self._columns.images and cells.get(name)), None):
            raise BadRow(row, "video", f"in column {video!r}: only pictures are read")
        most = self._max_tokens * self._processor.most_letters_of_a_token
        if len(problem) > most:  # tokenising it would take its time
            raise BadRow(row, "prompt too long", f"{len(problem)} letters are more than {self._max_tokens} tokens")
        return problem if PLACEHOLDER in problem else PLACEHOLDER * num_images + problem

    def _answers(self, row: int, cells: dict[str, Any]) -> tuple[str, ...]:
        """One at least; where none is needed it may be empty."""
        try:
            answers = answers_of(cells.get(self._columns.answer), self._answer_feature)
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

    def _read_columns(self) -> list[str]:
        """Those that are read of every row."""
        columns = [self._columns.problem]
        columns += [self._columns.answer] if self._needs_answer else []
        images = self._columns.images
        return columns + ([images] if images is not None and images in self._rows.column_names else [])
