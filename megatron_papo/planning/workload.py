"""What a step works on, in means: prompts with their images, responses, and the rows that they are packed into."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from megatron_papo.config import Config
from megatron_papo.costs.activations import RowSize
from megatron_papo.costs.flops import Flops, group_flops
from megatron_papo.costs.full_rows import ASSUMED_SHARES, RowShares
from megatron_papo.model.layer_costs import Grid
from megatron_papo.model.shape import ModelShape

SLOTS_PER_STAGE = 2
"""Rows that a pipeline stage gets at least (`training.batching`)."""


@dataclass(frozen=True)
class Workload:
    """The batch of one step, in means."""

    prompts: int
    """Prompts per step, over all ranks."""
    group_size: int
    updates: int
    text_tokens: int
    """Text tokens of a prompt, beside its image tokens."""
    grids: tuple[Grid, ...]
    """A prompt's images, in patches."""
    response_tokens: int
    """Mean tokens of a response."""
    longest_response: int
    row_tokens: int
    """Token budget of a row."""
    joint: bool
    """Whether both views are in a row, with gradient through both."""
    score_passes: float
    """Forward passes over all rows of a step beside the updates: old, masked and reference log-probs."""
    shares: RowShares = ASSUMED_SHARES
    """What the rows consist of that memory is counted for: as `papo check` takes it, whatever the lengths above, or
    `with_own_shares`."""

    @classmethod
    def of(
        cls,
        config: Config,
        shape: ModelShape,
        *,
        text_tokens: int = 150,
        image_tokens: int = 600,
        response_tokens: int | None = None,
    ) -> Workload:
        """The batch of these settings; lengths depend on the data, so they are arguments."""
        train, longest = config.train, config.generation.max_response_tokens
        joint = config.reads_joint_rows
        masked = 1.0 if config.reads_masked_view and not joint else 0.0
        old = (train.updates_per_step - 1) / train.updates_per_step
        return cls(
            prompts=train.prompts_per_step,
            group_size=train.group_size,
            updates=train.updates_per_step,
            text_tokens=text_tokens,
            grids=(_grid(image_tokens, shape),) if image_tokens else (),
            response_tokens=min(response_tokens or max(1, longest // 4), longest),
            longest_response=longest,
            row_tokens=train.tokens_per_micro_batch,
            joint=joint,
            score_passes=old + masked + (1.0 if config.loss.reference_coef > 0 else 0.0),
        )

    def with_own_shares(self, shape: ModelShape) -> Workload:
        """The same batch, with memory counted for rows of its own mean lengths: for a step that was measured, whose
        memory was that of its own rows."""
        group = self.prompt_tokens(shape) + self.group_size * self.response_tokens
        shares = RowShares(self.image_tokens(shape) / group, self.group_size * self.response_tokens / group)
        return replace(self, shares=shares)

    def image_tokens(self, shape: ModelShape) -> int:
        return sum(time * height * width for time, height, width in self.grids) // shape.vision.merge_unit

    def prompt_tokens(self, shape: ModelShape) -> int:
        return self.text_tokens + self.image_tokens(shape)

    def step_tokens(self, shape: ModelShape) -> int:
        """Tokens of a step as `tokens_per_s` counts them: every rollout with its prompt."""
        return self.prompts * self.group_size * (self.prompt_tokens(shape) + self.response_tokens)

    def rows(self, shape: ModelShape, data: int, pipeline: int = 1) -> Rows:
        """The rows of one update on one of `data` data-parallel ranks; a pipeline gets two a stage, as far as there are
        prompts, as the trainer packs them."""
        views = 2 if self.joint else 1
        prompts = self.prompts / self.updates / data
        group = views * (self.prompt_tokens(shape) + self.group_size * self.response_tokens)
        if group <= self.row_tokens:
            num_rows = math.ceil(prompts / (self.row_tokens // group))
            if pipeline > 1:
                num_rows = max(num_rows, min(SLOTS_PER_STAGE * pipeline, math.ceil(prompts)))
            groups, responses = prompts / num_rows, float(self.group_size)
        else:
            room = max(1, self.row_tokens // views - self.prompt_tokens(shape))
            pieces = math.ceil(self.group_size * self.response_tokens / room)
            num_rows = math.ceil(prompts) * pieces
            groups, responses = prompts * pieces / num_rows, self.group_size / pieces
        return Rows(self, max(1, num_rows), groups, responses)


@dataclass(frozen=True)
class Rows:
    """The rows of an update on a rank, all alike."""

    work: Workload
    num: int
    groups: float
    """Prompts in a row."""
    responses: float
    """Responses of each prompt in a row."""

    def flops(self, shape: ModelShape) -> Flops:
        """FLOPs of one forward pass over one row."""
        whole = round(self.responses) or 1
        lengths = [round(self.work.response_tokens * self.responses / whole)] * whole
        one = group_flops(self.work.prompt_tokens(shape), lengths, self.work.grids, shape)
        factor = self.groups * (2 if self.work.joint else 1)
        return Flops(*(round(value * factor) for value in (one.language, one.attention, one.vision, one.head)))

    def size(self, shape: ModelShape) -> RowSize:
        views = 2 if self.work.joint else 1
        answers = self.groups * self.responses * self.work.response_tokens
        patches = sum(time * height * width for time, height, width in self.work.grids)
        return RowSize(
            tokens=round(views * (self.groups * self.work.prompt_tokens(shape) + answers)),
            patches=round(views * self.groups * patches),
            responses=round(views * answers),
        )


def _grid(image_tokens: int, shape: ModelShape) -> Grid:
    """The patches of about a square image of so many tokens."""
    edge = shape.vision.spatial_merge_size
    height = max(1, math.isqrt(image_tokens))
    return 1, edge * height, edge * max(1, round(image_tokens / height))
