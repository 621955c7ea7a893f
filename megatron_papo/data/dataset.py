"""Rows of a dataset as prompts, each checked when it is drawn.

Columns `problem` (with `<image>` placeholders), `answer`, `images`, under names of your own; two presets know how
ViRL39K (both its own release and the one of PAPO's authors) and Geometry3K name theirs. A row that cannot be a prompt
raises BadRow with its number and the reason; what then happens is for `draw` to decide.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from PIL import Image

from megatron_papo.config import ColumnsConfig, DataConfig
from megatron_papo.data.images import ImageFileMissing, decode_image, image_bytes
from megatron_papo.data.masking import Masks, mask_images
from megatron_papo.data.processor import PLACEHOLDER, ImageTooExtreme, Processor
from megatron_papo.data.source import open_source
from megatron_papo.types import Prompt

_PRESETS = {
    # PAPO's release has problem/images; TIGER-Lab's has question/image, the answer inside \boxed{}.
    "virl39k": (ColumnsConfig(), ColumnsConfig(problem="question", answer="answer", images="image")),
    "geometry3k": (ColumnsConfig(),),
}


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
        source = open_source(name, split, self._key)
        self._rows, self._folder = source.rows, source.folder
        self._columns = self._choose_columns(data)

    def __len__(self) -> int:
        return len(self._rows)

    def prompt(self, row: int, masks: Masks | None = None) -> Prompt:
        """The row as the model reads it, and with `masks` also its masked view; raises BadRow.

        Pictures are decoded once for both views and not kept: a batch of them would fill the host's memory.
        """
        cells = self._rows[row]
        problem = cells[self._columns.problem]
        if not isinstance(problem, str) or not problem.strip():
            raise BadRow(row, "no problem")
        answer = self._answer(row, cells)
        compressed = self._compressed(row, cells)
        if problem.count(PLACEHOLDER) != len(compressed):
            placeholders = problem.count(PLACEHOLDER)
            raise BadRow(row, "placeholder count", f"{placeholders} {PLACEHOLDER} for {len(compressed)} images")
        if token := self._processor.vision_token_in(problem):
            raise BadRow(row, "vision token in text", token)
        images = self._pixels(row, compressed)
        try:
            inputs = self._processor.encode(problem, images)
        except ImageTooExtreme as error:
            raise BadRow(row, "image too extreme", str(error)) from None
        if inputs.token_ids_S.numel() > self._max_tokens:
            tokens = inputs.token_ids_S.numel()
            raise BadRow(row, "prompt too long", f"{tokens} tokens, data.max_prompt_tokens is {self._max_tokens}")
        prompt = Prompt(f"{self.which}:{row}", row, problem, answer, compressed, inputs)
        return prompt if masks is None else self.mask(prompt, masks, images)

    def mask(self, prompt: Prompt, masks: Masks, images: Sequence[Image.Image] | None = None) -> Prompt:
        """A prompt of this dataset with its masked view made, or made anew; see `mask_images`."""
        return mask_images(
            prompt, masks.settings, self._processor, seed=masks.seed, step=masks.step, images=images, swap_pool=self
        )

    def images(self, row: int) -> tuple[bytes, ...]:
        """Compressed images of a row; raises BadRow when a file is missing."""
        return self._compressed(row, self._rows[row])

    def column(self, row: int, name: str) -> Any:
        """Any other cell of the row, e.g. the response that supervision reads; ValueError for an unknown column."""
        if name not in self._rows.column_names:
            raise ValueError(f"{self._key}: {self.name} has no column {name!r}, has {self._listed()}")
        return self._rows[row][name]

    def _answer(self, row: int, cells: dict[str, Any]) -> str:
        value = cells.get(self._columns.answer)
        answer = "" if value is None else str(value)
        if self._needs_answer and not answer.strip():
            raise BadRow(row, "no answer")
        return answer

    def _compressed(self, row: int, cells: dict[str, Any]) -> tuple[bytes, ...]:
        try:
            return image_bytes(cells.get(self._columns.images), self._folder)
        except ImageFileMissing as error:
            raise BadRow(row, "image file missing", str(error)) from None
        except ValueError as error:
            raise BadRow(row, "corrupt image", str(error)) from None

    @staticmethod
    def _pixels(row: int, compressed: tuple[bytes, ...]) -> list[Image.Image]:
        try:
            return [decode_image(data) for data in compressed]
        except ValueError as error:
            raise BadRow(row, "corrupt image", str(error)) from None

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
