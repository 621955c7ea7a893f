"""Prompts of a given length with random pictures, and random responses to them: what every side trains on.

Four fifths of a prompt are image tokens. Text is digits, which the benchmark's tokenizer never joins, so that a
prompt has exactly the length asked for. Pictures are noise: their content changes no time.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.models import NUM_PLAIN_WORDS
from megatron_papo.algorithm.advantages import with_advantages
from megatron_papo.config import MaskConfig
from megatron_papo.data.conversation import PLACEHOLDER
from megatron_papo.data.images import decode_image
from megatron_papo.data.masking import Masks, mask_images
from megatron_papo.data.processor import Processor
from megatron_papo.types import Group, Prompt, Rollout

IMAGE_SHARE = 0.8
NUM_ROWS = 16
"""Number of rows of a file that `write_rows` writes."""


@dataclass(frozen=True)
class Workload:
    prompt_tokens: int = 600
    response_tokens: int = 64
    num_prompts: int = 4
    group_size: int = 8
    num_images: int = 1
    """Number of pictures of a prompt."""
    uneven: bool = False
    """Whether response lengths are random, between an eighth of `response_tokens` and all of them."""

    @property
    def name(self) -> str:
        return f"{self.prompt_tokens} + {self.response_tokens}{' uneven' if self.uneven else ''} tokens"


def make_groups(workload: Workload, processor: Processor, seed: int = 0) -> list[Group]:
    """The groups, with advantages from random rewards and every prompt's masked view."""
    random = np.random.default_rng(seed)
    groups = []
    for row in range(workload.num_prompts):
        prompt = _prompt(workload, row, processor, random)
        prompt = mask_images(prompt, Masks(MaskConfig(), seed), processor)
        rollouts = tuple(_rollout(workload, index, random) for index in range(workload.group_size))
        rewards = tuple(random.random(workload.group_size).tolist())
        groups.append(with_advantages(Group(prompt, rollouts, rewards)))
    return groups


def make_question(prompt_tokens: int, num_images: int, template_tokens: int, random: np.random.Generator) -> str:
    """One placeholder a picture, then digits up to `prompt_tokens`, of which the template takes `template_tokens`."""
    rows, columns = image_grid(prompt_tokens, num_images)
    digits = prompt_tokens - template_tokens - num_images * (rows * columns + 2)  # 2: start and end of an image
    assert digits > 0, f"{num_images} images of {rows} x {columns} tokens leave no room in {prompt_tokens}"
    return PLACEHOLDER * num_images + "".join(str(digit) for digit in random.integers(0, 10, digits))


def template_length(processor: Processor) -> int:
    """Number of tokens of a prompt that the chat template adds."""
    return processor.encode("0", []).token_ids_S.numel() - 1


def make_picture(prompt_tokens: int, num_images: int, processor: Processor, random: np.random.Generator) -> bytes:
    """A PNG of noise that becomes `image_grid` image tokens."""
    rows, columns = image_grid(prompt_tokens, num_images)
    edge = processor.patch_size * processor.merge_size  # of the square that becomes one token
    pixels = random.integers(0, 256, (rows * edge, columns * edge, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def image_grid(prompt_tokens: int, num_images: int) -> tuple[int, int]:
    """Rows and columns of image tokens of each picture, as square as possible."""
    tokens = int(prompt_tokens * IMAGE_SHARE) // num_images
    rows = int(tokens**0.5)
    return rows, tokens // rows


def num_tokens(groups: Sequence[Group]) -> int:
    """Prompt and response, the prompt counted once a rollout: the same count for every side."""
    return sum(
        group.prompt.inputs.token_ids_S.numel() + len(rollout.response_ids)
        for group in groups
        for rollout in group.rollouts
    )


def _prompt(workload: Workload, row: int, processor: Processor, random: np.random.Generator) -> Prompt:
    length, num_images = workload.prompt_tokens, workload.num_images
    question = make_question(length, num_images, template_length(processor), random)
    images = tuple(make_picture(length, num_images, processor, random) for _ in range(num_images))
    inputs = processor.encode(question, [decode_image(image) for image in images])
    assert inputs.token_ids_S.numel() == length, f"{inputs.token_ids_S.numel()} tokens instead of {length}"
    return Prompt(f"benchmark:{row}", row, question, "0", images, inputs)


def _rollout(workload: Workload, index: int, random: np.random.Generator) -> Rollout:
    longest = workload.response_tokens
    length = int(random.integers(max(longest // 8, 1), longest + 1)) if workload.uneven else longest
    ids = tuple(random.integers(0, NUM_PLAIN_WORDS, length).tolist())
    return Rollout(index, ids, (0.0,) * length, "", "length", policy_version=0)


def share_of_even_bytes(response: str, answer: str, problem: str) -> float:
    """A reward that random weights get some of, unequal within a group."""
    values = response.encode()
    return sum(byte % 2 == 0 for byte in values) / max(len(values), 1)


def write_rows(folder: Path, workload: Workload, processor: Processor) -> list[dict[str, str]]:
    """`folder`/rows.jsonl with a picture a row; returns what it says."""
    random = np.random.default_rng(0)
    rows = []
    for row in range(NUM_ROWS):
        question = make_question(workload.prompt_tokens, 1, template_length(processor), random)
        (folder / f"{row}.png").write_bytes(make_picture(workload.prompt_tokens, 1, processor, random))
        rows.append({"problem": question, "answer": "0", "images": f"{row}.png"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows
