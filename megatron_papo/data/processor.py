"""The one canonical call that turns a question and its pictures into what the model reads.

Wraps the model folder's own processor (tokenizer, image processor, chat template). Every place that needs token ids
or pixels of a prompt comes through here, so that trainer, engine and scorer cannot read a prompt differently. In which
form the chat template is given a question stands in `conversation.py`; for the published template both give the same.
Video is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from megatron_papo.config import DataConfig
from megatron_papo.data.chat_template import TemplateFailed, chat_template
from megatron_papo.data.conversation import (
    IMAGE_PAD,
    PLACEHOLDER,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
    Form,
    Turns,
    check_rendered,
    content_of,
    find_form,
    instructed,
    turns_of,
)
from megatron_papo.data.processor_files import THINK_TAGS, listed_ends, pixel_bounds, read_processor, text_tokenizer
from megatron_papo.types import ModelInputs

_COMPOSED = 4
"""Letters that a tokenizer may make one of before it looks for tokens (Unicode's composed forms); rather too many."""
_MAX_ASPECT = 200
"""Longer edge over shorter edge; the image processor refuses more."""


Pixels = tuple[Tensor, Tensor]
"""([P, D] float32, [I, 3] int64): patches of one picture or several, and the grid of each."""


class ImageTooExtreme(ValueError):
    """An aspect ratio that the image processor cannot resize."""


def load_processor(folder: Path, data: DataConfig) -> Processor:
    """The processor of a Hugging Face model folder, with the pixel bounds, instruction and system turn of `data`.

    Raises ValueError naming the folder and what it lacks.
    """
    return Processor(read_processor(Path(folder)), Path(folder), data)


class Processor:
    """Encodes prompts, pictures and responses; decodes responses. Built by `load_processor`."""

    def __init__(self, hf_processor: Any, folder: Path, data: DataConfig) -> None:
        self.tokenizer = hf_processor.tokenizer
        self.image_processor = hf_processor.image_processor
        self.pixel_bounds = pixel_bounds(self.image_processor, folder, data)
        """The least and the most pixels of a picture as the model sees it."""
        self.image_processor.size = dict(zip(("shortest_edge", "longest_edge"), self.pixel_bounds))
        self.folder = folder
        self.instruction = data.instruction
        self.system = data.system
        self.template: str = hf_processor.chat_template
        """The chat template's own text."""
        self._text_tokenizer = text_tokenizer(self.tokenizer, self.template)
        vocabulary = self.tokenizer.get_vocab()
        missing = [token for token in (VISION_START, IMAGE_PAD, VISION_END) if token not in vocabulary]
        if missing:
            raise ValueError(f"model.path: the tokenizer of {folder} lacks {', '.join(missing)}")
        for key, text in (("data.instruction", data.instruction), ("data.system", data.system or "")):
            if self.vision_token_in(text):
                raise ValueError(f"{key}: contains the vision token {self.vision_token_in(text)}")
        self.num_words: int = max(vocabulary.values()) + 1
        """One more than the highest token id."""
        self.image_token_id: int = vocabulary[IMAGE_PAD]
        self.vision_token_ids: tuple[int, ...] = tuple(
            vocabulary[token] for token in (VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD) if token in vocabulary
        )

    def encode(self, problem: str, images: Sequence[Image.Image]) -> ModelInputs:
        """The user's turn, ready for an answer: `problem` holds one `<image>` a picture, in order.

        Raises ValueError when the counts differ or the text holds vision tokens of its own, ImageTooExtreme.
        """
        text_ids_S = self.text_ids(problem, len(images))
        return self.join(text_ids_S, [self.pixel_values([image]) for image in images])

    def text_ids(self, problem: str, num_images: int, system: str | None = None) -> Tensor:
        """[S] int64: the prompt with one image token a picture, known before a picture is read; `system` is the text of
        its own system turn, else data.system has it.

        Raises ValueError as `encode`, TemplateFailed.
        """
        if problem.count(PLACEHOLDER) != num_images:
            raise ValueError(f"{problem.count(PLACEHOLDER)} {PLACEHOLDER} placeholders for {num_images} images")
        if token := self.vision_token_in(problem + (system or "")):
            raise ValueError(f"the text contains the vision token {token}")
        return torch.tensor(self._ids(self.render(problem, system)), dtype=torch.int64)

    def join(self, text_ids_S: Tensor, pixels: Sequence[Pixels]) -> ModelInputs:
        """The prompt of `text_ids` with its pictures, each as `pixel_values` gives it: its token once a merged patch.

        transformers repeats the token in the text before it makes ids of it, to the same effect.
        """
        if not pixels:
            return ModelInputs(text_ids_S, None, None)
        grid_thw_I3 = torch.cat([grid for _, grid in pixels])
        counts_S = torch.ones_like(text_ids_S)
        counts_S[text_ids_S == self.image_token_id] = self.num_tokens(grid_thw_I3)
        values_PD = [values for values, _ in pixels]
        return ModelInputs(text_ids_S.repeat_interleave(counts_S), torch.cat(values_PD), grid_thw_I3)

    def num_tokens(self, grid_thw_I3: Tensor) -> Tensor:
        """[I] int64: image tokens of each picture."""
        return grid_thw_I3.prod(dim=1) // self.merge_size**2

    def render(self, problem: str, system: str | None = None) -> str:
        """The prompt as text, one image token a picture, up to where the assistant's turn begins; `system` as in
        `text_ids`.

        Raises TemplateFailed, also where question or pictures are not in it as they were given.
        """
        question, spoken = instructed(problem, self.instruction), system or self.system
        text = self._apply_template(turns_of(question, spoken, self.form), True)
        try:
            check_rendered(text, question, spoken)
        except TemplateFailed as error:
            raise self._fault(error) from None
        return text

    @cached_property
    def form(self) -> Form:
        """In which the chat template takes a turn. Raises TemplateFailed for one that takes none."""
        try:
            return find_form(self._render, self.system)
        except TemplateFailed as error:
            raise self._fault(error) from None

    def pixel_values(self, images: Sequence[Image.Image]) -> Pixels:
        """Normalised pixels of pictures without a text: the masked view goes the same way as the original.
        Raises ImageTooExtreme."""
        for image in images:
            check_aspect(image)
        batch = self.image_processor(images=list(images), return_tensors="pt")
        return batch["pixel_values"].float(), batch["image_grid_thw"]

    def encode_response(self, text: str) -> tuple[int, ...]:
        """Token ids of an assistant's turn, closed by the end-of-turn token."""
        return (*self.answer_ids(text), self.end_of_turn_id)

    def answer_ids(self, text: str) -> tuple[int, ...]:
        """Token ids of what stands of an answer behind the prompt."""
        return tuple(self._ids(self.behind_prefix(text)))

    def behind_prefix(self, answer: str) -> str:
        """The answer without the think block's beginning that the chat template writes already, if it has one."""
        prefix = self.response_prefix
        if prefix and answer.startswith(opening := prefix.strip()):
            return answer.removeprefix(prefix) if answer.startswith(prefix) else answer.removeprefix(opening)
        return answer

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True)

    @cached_property
    def end_of_turn_id(self) -> int:
        """The token that the chat template writes after an assistant's turn; else the tokenizer's end of sequence."""
        marker = "7"
        texts = [""]
        for form in dict.fromkeys((self.form, "text")):  # templates of parts may take an answer as text
            with suppress(TemplateFailed):
                turns = [*turns_of(marker, None, self.form), {"role": "assistant", "content": content_of(marker, form)}]
                texts.append(self._apply_template(turns, False))
        after = max(texts, key=lambda text: text.count(marker)).rpartition(marker)[2]
        special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
        for token_id in self.tokenizer(after, add_special_tokens=False)["input_ids"]:
            if token_id in special:
                return token_id
        if self.tokenizer.eos_token_id is None:
            raise ValueError(f"model.path: the tokenizer of {self.folder} has no end-of-turn token")
        return self.tokenizer.eos_token_id

    @cached_property
    def response_prefix(self) -> str:
        """The think block that the chat template opens at the head of every answer: `<think>\\n`, or nothing. One that
        it closes too, as some templates do where thinking is off, is the template's and no part of the answer."""
        after = self.render("7").rpartition(self.instruction.strip() or "7")[2]  # of the question
        opening, closing = THINK_TAGS
        _, opened, rest = after.rpartition(opening)
        return opened + rest if opened and closing not in rest else ""

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end a response, the end of turn first: template, tokenizer and generation_config.json agree."""
        token_ids = [self.end_of_turn_id, self.tokenizer.eos_token_id]
        token_ids += listed_ends(self.folder / "generation_config.json")
        return tuple(dict.fromkeys(token_id for token_id in token_ids if token_id is not None))

    @cached_property
    def most_letters_of_a_token(self) -> int:
        """A text of more letters for each token than this cannot be so few tokens."""
        return _COMPOSED * max(map(len, self.tokenizer.get_vocab()))

    @property
    def merge_size(self) -> int:
        """Patches of a merged patch, along an edge."""
        return self.image_processor.merge_size

    @property
    def patch_size(self) -> int:
        """Pixels of a patch, along an edge."""
        return self.image_processor.patch_size

    @staticmethod
    def vision_token_in(text: str) -> str | None:
        """The first vision token written in plain text, which would be read as a picture."""
        return next((token for token in (VISION_START, IMAGE_PAD, VISION_END, VIDEO_PAD) if token in text), None)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._text_tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _apply_template(self, turns: Turns, add_generation_prompt: bool) -> str:
        try:
            return self._render(turns, add_generation_prompt)
        except TemplateFailed as error:
            raise self._fault(error) from None

    def _render(self, turns: Turns, add_generation_prompt: bool) -> str:
        tokens = self.tokenizer.special_tokens_map
        return chat_template(self.template).render(turns, add_generation_prompt=add_generation_prompt, **tokens)

    def _fault(self, error: TemplateFailed) -> TemplateFailed:
        return TemplateFailed(f"model.path: the chat template of {self.folder}: {error}")


def check_aspect(image: Image.Image) -> None:
    """Raises ImageTooExtreme for what the image processor would refuse."""
    if max(image.size) > _MAX_ASPECT * min(image.size):
        raise ImageTooExtreme(f"{image.width} x {image.height} pixels, aspect ratio beyond {_MAX_ASPECT}")
