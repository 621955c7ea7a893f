"""The row that memory is counted for: one that fills its budget of tokens, and how many of them a stage holds.

`papo check`, the planner and the benchmarks take both from here, so that they count alike. What a row holds depends on
the data: `ASSUMED_SHARES` is what is taken where nothing of it is known, near the most that rows of one picture a
prompt need, since a picture's patches take several times the memory of the same number of text tokens. Means of real
lengths give other shares, which need less as long as responses are long. No torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_papo.config import Config
from megatron_papo.costs.activations import RowSize
from megatron_papo.model.shape import ModelShape


@dataclass(frozen=True)
class RowShares:
    """What a packed row consists of, as shares of its tokens; the rest is text of prompts."""

    images: float
    """Image tokens, after merging."""
    responses: float
    """Tokens that the head reads."""


ASSUMED_SHARES = RowShares(images=0.5, responses=0.5)
"""Such are responses of 120 tokens, five to a prompt of 600 image tokens: what a policy comes to that answers
shortly. Each share by itself is counted for the part of memory that grows with it."""


def full_row(config: Config, shape: ModelShape, shares: RowShares = ASSUMED_SHARES) -> RowSize:
    """The size of a row that fills `train.tokens_per_micro_batch`, of such shares."""
    tokens = config.train.tokens_per_micro_batch
    patches = int(tokens * shares.images) * shape.vision.merge_unit
    return RowSize(tokens, patches, int(tokens * shares.responses))


def rows_in_flight(config: Config, stage: int, num_data: int) -> int:
    """The number of rows that a pipeline stage keeps activations of at a time: as many as there are stages from this
    one on, and no more than an update can have on one of `num_data` data-parallel ranks, each prompt cut into as many
    rows as its longest responses would need."""
    train, generation = config.train, config.generation
    budget = train.tokens_per_micro_batch // (2 if config.reads_joint_rows else 1)
    room = max(1, budget - config.data.max_prompt_tokens)
    pieces = math.ceil(train.group_size * generation.max_response_tokens / room)
    prompts = math.ceil(train.prompts_per_step / train.updates_per_step / num_data)
    return max(1, min(config.parallel.pipeline - stage, prompts * pieces))


def in_words(config: Config, shares: RowShares = ASSUMED_SHARES) -> str:
    """What activations are counted for, as a reader of their number has to know it."""
    tokens = config.train.tokens_per_micro_batch
    return f"full rows of {tokens:,} tokens, {shares.images:.0%} of images, {shares.responses:.0%} of responses"
