"""How much arithmetic the model needs for a packed row: FLOPs by part, from the lengths of its segments and images.

Model FLOPs are those of the forward pass's matrix products, a multiply-add counted as two; backward is twice as much.
Attention is counted as it is structured: causal halves, shared prompts, windows. Left out: what layout and
implementation add (recomputation, padding of batches and widths), all that is no matrix product, and that frozen parts
save some of backward. `Meter` adds up a step's rows. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import TYPE_CHECKING

from megatron_papo.model.layer_costs import Grid, costs_of, language_layer
from megatron_papo.model.shape import ModelShape

if TYPE_CHECKING:
    from megatron_papo.types import MicroBatch


@dataclass(frozen=True)
class Flops:
    """FLOPs of one or several passes, by part of the model."""

    language: int = 0
    """The matrices of the language model's layers."""
    attention: int = 0
    """Scores and weighted values of the language model."""
    vision: int = 0
    """The vision tower: patch embedding, layers with their attention, merger."""
    head: int = 0
    """Logits of the response tokens over the true vocabulary."""

    @property
    def total(self) -> int:
        return sum(astuple(self))

    def __add__(self, other: Flops) -> Flops:
        return Flops(*(own + more for own, more in zip(astuple(self), astuple(other))))

    def __mul__(self, num_passes: int) -> Flops:
        return Flops(*(own * num_passes for own in astuple(self)))


def row_flops(row: MicroBatch, shape: ModelShape) -> Flops:
    """FLOPs of one forward pass over a row, of one view or of both."""
    num_pairs = sum(
        causal_pairs(segment.length, 0 if segment.parent is None else row.segments[segment.parent].length)
        for segment in row.segments
    )
    num_views = 1 if row.masked_logit_index_R is None else 2
    grids = [] if row.grid_thw_I3 is None else row.grid_thw_I3.tolist()
    return _flops(row.num_tokens, num_pairs, num_views * row.target_ids_R.numel(), grids, shape)


def group_flops(prompt_tokens: int, response_lengths: Sequence[int], grids: Sequence[Grid], shape: ModelShape) -> Flops:
    """FLOPs of one forward pass over a prompt and its responses, which share the prompt's tokens and images: what a
    group costs before it is packed. `grids`: the prompt's images."""
    num_tokens = sum(response_lengths)
    num_pairs = causal_pairs(prompt_tokens) + sum(causal_pairs(length, prompt_tokens) for length in response_lengths)
    return _flops(prompt_tokens + num_tokens, num_pairs, num_tokens, grids, shape)


def causal_pairs(length: int, parent_length: int = 0) -> int:
    """The number of query and key pairs of a segment: each of its tokens attends to all of the parent, to the tokens
    before it and to itself."""
    return length * (length + 1) // 2 + length * parent_length


def _flops(num_tokens: int, num_pairs: int, num_logits: int, grids: Sequence[Grid], shape: ModelShape) -> Flops:
    language = shape.language
    layer = language_layer(shape)
    return Flops(
        language=2 * num_tokens * language.num_layers * layer.products,
        attention=4 * num_pairs * language.num_layers * layer.query_width,
        vision=costs_of(shape).vision_flops(grids, shape),
        head=2 * num_logits * language.hidden_size * language.vocab_size,
    )


class Meter:
    """Adds up a step's work on this rank's rows; as with the clock, stages fill it and `take` empties it.

    The ranks of a model-parallel group share their rows, so the sum over the data-parallel ranks is the run's. Rows of
    which no loss reads a token (those of a rank that has no prompts left) are no work.
    """

    def __init__(self, shape: ModelShape):
        self._shape = shape
        self._scored = self._updated = Flops()
        self._tokens = 0

    def scored(self, batches: Iterable[Sequence[MicroBatch]]) -> None:
        """Counts the forward passes that left log-probs in the rows: old, masked, reference, as many as there are."""
        for row in _rows_that_count(row for batch in batches for row in batch):
            passes = (row.old_logprobs_R, row.masked_logprobs_R, row.ref_logprobs_R)
            num_passes = len({id(logprobs_R) for logprobs_R in passes if logprobs_R is not None})  # one may serve twice
            self._scored += row_flops(row, self._shape) * num_passes

    def updated(self, rows: Iterable[MicroBatch]) -> None:
        """Counts forward and backward of the rows of an update."""
        for row in _rows_that_count(rows):
            self._updated += row_flops(row, self._shape) * 3
            self._tokens += row.num_tokens

    def take(self) -> dict[str, int]:
        """The work since the last call: `flops/<part>` of all passes; `update_flops` and `update_tokens` of updates
        alone."""
        passes = asdict(self._scored + self._updated)
        taken = {f"flops/{part}": value for part, value in passes.items()}
        taken |= {"update_flops": self._updated.total, "update_tokens": self._tokens}
        self._scored = self._updated = Flops()
        self._tokens = 0
        return taken


def _rows_that_count(rows: Iterable[MicroBatch]) -> list[MicroBatch]:
    return [row for row in rows if row.loss_mask_R.any()]
