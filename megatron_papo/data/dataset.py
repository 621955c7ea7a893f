"""Rows of a dataset as prompts, each checked when it is drawn.

Columns `problem` (with `<image>` placeholders), `answer`, `images`, under names of your own; two presets know how
ViRL39K (both its own release and the one of PAPO's authors) and Geometry3K name theirs. A row that cannot be a prompt
raises BadRow with its number and the reason; what then happens is for `draw` to decide.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from PIL import Image

from megatron_papo.config import ColumnsConfig, DataConfig
from megatron_papo.data.chat_template import TemplateFailed
from megatron_papo.data.fingerprint import fingerprints_of_rows
from megatron_papo.data.image_files import BadImage
from megatron_papo.data.images import decode_image, image_bytes, image_items
from megatron_papo.data.masking import Masks, mask_images, mask_random, spoil_image, with_masked
from megatron_papo.data.processor import PLACEHOLDER, ImageTooExtreme, Pixels, Processor
from megatron_papo.data.source import open_source
from megatron_papo.types import Prompt

_PRESETS = {
    # PAPO's release has problem/images; TIGER-Lab's has question/image, the answer inside \boxed{}.
    "virl39k": (ColumnsConfig(), ColumnsConfig(problem="question", answer="answer", images="image")),
    "geometry3k": (ColumnsConfig(),),
}


Spoiler = Callable[[Image.Image], Image.Image]

_MAX_ANSWER = 65_536
"""Letters. Every response is compared with all of them."""


class BadRow(ValueError):
    """A row that cannot be a prompt. `reason` is one of a few, for counting; `detail` says more."""

    def __init__(self, row: int, reason: str, detail: str = "") -> None:
        super().__init__(f"row {row}: {reason}" + (f" ({detail})" if detail else ""))
        self.row, self.reason, self.detail = row, reason, detail


@dataclass
class BadRows:
    """What to do about bad rows, and which were met: each row counts once."""

    action: Literal["skip", "stop"]
    found: dict[int, BadRow] = field(default_factory=dict)
    _num_named: int = 0

    def add(self, bad: BadRow) -> None:
        """Notes the row; with `stop`, raises it."""
        if self.action == "stop":
            raise bad
        self.found[bad.row] = bad

    def copy(self) -> BadRows:
        """The same rows, for a thread to add to; `merge` brings what it met back."""
        return BadRows(self.action, dict(self.found))

    def merge(self, other: BadRows) -> None:
        """Notes the rows of a copy too, in the order in which it met them."""
        self.found.update(other.found)

    def take_new(self) -> list[BadRow]:
        """Those met since the last call, to be named to the user."""
        new = list(self.found.values())[self._num_named :]
        self._num_named = len(self.found)
        return new

    @property
    def counts(self) -> dict[str, int]:
        """reason -> rows."""
        return dict(Counter(bad.reason for bad in self.found.values()))

    def __str__(self) -> str:
        return "\n".join(str(self.found[row]) for row in sorted(self.found)) or "no bad rows"


@contextmanager
def _named(row: int) -> Iterator[None]:
    """What goes wrong with the row's own values is BadRow: a row is not trusted to fit memory or recursion either."""
    try:
        yield
    except BadImage as error:
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
        self._max_pixels = data.max_image_pixels
        source = open_source(name, split, self._key, data.image_roots)
        self._rows, self._images = source.rows, source.images
        self._columns = self._choose_columns(data)

    def __len__(self) -> int:
        return len(self._rows)

    def prompt(self, row: int, masks: Masks | None = None, visit: int = 0) -> Prompt:
        """The row as the model reads it, and with `masks` also its masked view at this `visit`; raises BadRow.

        What costs least is looked at first, and pictures are decoded one at a time, once for both views, and not kept:
        a batch of them would fill the host's memory.
        """
        with _named(row):
            cells = self._rows[row]
            problem, answer = self._problem(row, cells), self._answer(row, cells)
            items = image_items(cells.get(self._columns.images))
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
            prompt = Prompt(prompt_id, row, problem, answer, compressed, inputs, visit=visit)
            if masked:
                return with_masked(prompt, masked)
            return prompt if masks is None else mask_images(prompt, masks, self._processor, self)

    def images(self, row: int) -> tuple[bytes, ...]:
        """Compressed images of a row; raises BadRow when one cannot be read."""
        with _named(row):
            return image_bytes(image_items(self._rows[row].get(self._columns.images)), self._images, self._max_pixels)

    def decoded(self, data: bytes) -> Image.Image:
        """A picture of this dataset, RGB; raises BadImage."""
        return decode_image(data, self._max_pixels)

    def column(self, row: int, name: str) -> Any:
        """Any other cell of the row, e.g. the response that supervision reads; ValueError for an unknown column."""
        if name not in self._rows.column_names:
            raise ValueError(f"{self._key}: {self.name} has no column {name!r}, has {self._listed()}")
        return self._rows[row][name]

    def fingerprints(self, more_columns: Sequence[str] = ()) -> dict[str, str]:
        """Of what is read of the rows, cells of `more_columns` included; see `fingerprint.py`."""
        read = (self._columns.problem, self._columns.answer, *more_columns)
        columns = [name for name in dict.fromkeys(read) if name in self._rows.column_names]
        return fingerprints_of_rows(self._rows, columns, self.images)

    def _problem(self, row: int, cells: dict[str, Any]) -> str:
        problem = cells[self._columns.problem]
        if not isinstance(problem, str) or not problem.strip():
            raise BadRow(row, "no problem")
        most = self._max_tokens * self._processor.most_letters_of_a_token
        if len(problem) > most:  # tokenising it would take its time
            raise BadRow(row, "prompt too long", f"{len(problem)} letters are more than {self._max_tokens} tokens")
        return problem

    def _answer(self, row: int, cells: dict[str, Any]) -> str:
        value = cells.get(self._columns.answer)
        answer = "" if value is None else str(value)
        if self._needs_answer and not answer.strip():
            raise BadRow(row, "no answer")
        if len(answer) > _MAX_ANSWER:
            raise BadRow(row, "answer too long", f"{len(answer)} letters, at most {_MAX_ANSWER} are compared")
        return answer

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
        random = mask_random(masks.seed, visit, prompt_id, index)
        return partial(spoil_image, row=row, mask=masks.settings, random=random, swap_pool=self)

    def _view(self, data: bytes, spoil: Spoiler | None) -> tuple[Pixels, list[Pixels]]:
        """Of one picture, which is gone when the next is decoded."""
        image = self.decoded(data)
        pixels = self._processor.pixel_values([image])
        return pixels, [] if spoil is None else [self._processor.pixel_values([spoil(image)])]

    def _choose_columns(self, data: DataConfig) -> ColumnsConfig:
        has = set(self._rows.column_names)
        if data.preset == "none":
            required = [("problem", data.columns.problem)]
            required += [("answer", data.columns.answer)] if self._needs_answer else []
            for key, column in required:
                if column not in has:
                    raise ValueError(f"data.columns.{key}: {self.name} has no column {column!r}, has {self._listed()}")
            return data.columns
        for columns in _PRESETS[data.preset]:
            if {columns.problem, columns.answer, columns.images} <= has:
                return columns
        raise ValueError(f"data.preset: {self.name} is not laid out as {data.preset}, has {self._listed()}")

    def _listed(self) -> str:
        return ", ".join(self._rows.column_names)
