"""The values that flow through a step, and the only place where their shapes are defined.

Suffixes of tensor names: T tokens of a packed row, S tokens of one sequence, R response tokens of a micro-batch,
P vision patches, D values of a patch (channels x frames x height x width), I images. Every value is frozen; a
stage that adds something returns a copy (`dataclasses.replace`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`. It is copied to a GPU through pinned memory, since from other memory the host would wait
    until the GPU has finished its work. The pinned copy may go out of scope at once: torch does not reuse its memory
    before copies from it are done."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class ModelInputs:
    """A prompt as the model reads it: the output of the one canonical processor call."""

    token_ids_S: Tensor
    """[S] int64; every image already expanded to its run of image tokens."""
    pixel_values_PD: Tensor | None
    """[P, D] float32: patches in the processor's order; None for a prompt without images."""
    grid_thw_I3: Tensor | None
    """[I, 3] int64: patches in time, height, width, of each image, before merging."""


@dataclass(frozen=True)
class Prompt:
    """One row of the data set as a question to the model."""

    id: str
    """Name of the row of the data set, the same in the whole run. A row may be drawn more than once, even in one
    step."""
    row: int
    """Index of the row in the data set, from 0."""
    problem: str
    """The text of the question."""
    answer: str
    """The right answer, or the first of several."""
    images: tuple[bytes, ...]
    """Compressed bytes (PNG, JPEG) as they are in the data set."""
    inputs: ModelInputs
    masked_pixel_values_PD: Tensor | None = None
    """The masked view by the same processor, in the shape of inputs.pixel_values_PD."""
    visit: int = 0
    """Position of this draw in the run's endless order, which no other draw has; 0 for rows that are not drawn from it.
    Seeds of rollouts and masks are made from it."""
    other_answers: tuple[str, ...] = ()
    """Further right answers."""
    source: str = ""
    """Name of the data set that the row comes from, where a run reads several; metrics are also reported by it."""
    columns: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """The row's other cells by the names of their columns, pictures left out; a user's own functions are given them."""
    system: str | None = None
    """Text of the row's own system turn; None: that of data.system."""

    @property
    def answers(self) -> tuple[str, ...]:
        """All right answers; any of them counts."""
        return (self.answer, *self.other_answers)

    @property
    def num_images(self) -> int:
        return 0 if self.inputs.grid_thw_I3 is None else len(self.inputs.grid_thw_I3)

    @property
    def has_image(self) -> bool:
        return self.num_images > 0


@dataclass(frozen=True)
class Rollout:
    """One response to a prompt, as the engine returned it."""

    index: int
    """Place within the group."""
    response_ids: tuple[int, ...]
    """Tokens of the response, the end-of-turn token included when it was sampled."""
    rollout_logprobs: tuple[float, ...]
    """Log-probs of response_ids as the engine sampled them: after temperature, bans, top-k and top-p. 0 for tokens that
    were not sampled."""
    text: str
    """The response as text."""
    finish_reason: str
    """Why generation ended: `stop` or `length`."""
    policy_version: int
    """Number of the weights that sampled it: how many steps they had been trained for."""
    sampled: tuple[bool, ...] | None = None
    """For each of response_ids whether the policy sampled it; None: it sampled all, as in a response of one turn. With
    several turns the tokens between them (a tool's output) are given: later tokens attend to them, and no loss reads
    them. `MicroBatch.loss_mask_R` and the token weights are made from this."""

    @property
    def loss_mask(self) -> tuple[bool, ...]:
        """For each of response_ids whether the loss reads it."""
        return (True,) * len(self.response_ids) if self.sampled is None else self.sampled


@dataclass(frozen=True)
class Group:
    """The rollouts of one prompt with their rewards and advantages, which later stages add: one entry a rollout."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    rewards: tuple[float, ...] = ()
    reward_parts: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """Named parts before weighting, e.g. accuracy, format."""
    advantages: tuple[float, ...] = ()


class Segment(NamedTuple):
    """Consecutive tokens of a packed row that belong together. They attend to all tokens of the parent segment and,
    causally, to each other."""

    length: int
    parent: int | None = None
    """Index among the row's segments of the prompt that this response follows; None for a segment without a parent."""
    num_images: int = 0
    """Images whose tokens lie in this segment."""


@dataclass(frozen=True)
class MicroBatch:
    """One packed row: segments laid end to end, a prompt before the responses that share it.

    Tensors ending in _R have one value for each response token, in row order. Every token belongs to a segment:
    padding, where a layout needs it, is a last segment that no loss reads.
    """

    token_ids_T: Tensor
    """[T] int64: the tokens of the row."""
    position_ids_3T: Tensor
    """[3, T] int64: M-RoPE positions (time, height, width)."""
    segments: tuple[Segment, ...]
    """The segments in row order; their lengths sum to T."""
    pixel_values: tuple[Tensor, ...]
    """[P, D] float32 for each prompt that has images, in row order: the prompts' own tensors. They stay on the host,
    where `to` leaves them; the first pipeline stage lays them end to end."""
    grid_thw_I3: Tensor | None
    """[I, 3] int64 of all images of the row, in order of appearance; on the host, as the pixels."""
    target_ids_R: Tensor
    """[R] int64: the response tokens."""
    logit_index_R: Tensor
    """[R] int64: places in the row whose hidden state predicts each response token."""
    rollout_index_R: Tensor
    """[R] int64: which of `sequences` a response token belongs to."""
    loss_mask_R: Tensor
    """[R] bool: the only token mask; False for tokens that no loss reads."""
    has_image_R: Tensor
    """[R] bool: the token's prompt has an image, so that the perception term reads it."""
    weights_R: Tensor
    """[R] float32: share of each token in the global mean of the policy terms. The shares sum to 1 over the global
    batch, but with a fixed denominator to the number of tokens over that denominator."""
    perception_weights_R: Tensor
    """[R] float32: the same for the perception terms, over tokens whose prompt has an image."""
    advantages_R: Tensor
    """[R] float32: the advantage of each token."""
    rollout_logprobs_R: Tensor
    """[R] float32: log-probs of the tokens as the engine reported them."""
    sequences: tuple[tuple[str, int], ...] = ()
    """Prompt id and rollout index of each rollout, in row order; `rollout_index_R` points here."""
    masked_pixel_values: tuple[Tensor, ...] = ()
    """The masked view, shapes as in pixel_values; empty when the prompts have none."""
    masked_logit_index_R: Tensor | None = None
    """[R] int64, of a joint row: places whose hidden state predicts the same token under the masked image."""
    old_logprobs_R: Tensor | None = None
    """[R] float32: log-probs under the policy before the update."""
    ref_logprobs_R: Tensor | None = None
    """[R] float32: log-probs under the reference policy."""
    masked_logprobs_R: Tensor | None = None
    """[R] float32: log-probs under the masked image, by a frozen masked branch."""

    @property
    def num_tokens(self) -> int:
        return self.token_ids_T.numel()

    @property
    def segment_lengths(self) -> tuple[int, ...]:
        """Tokens of each segment."""
        return tuple(segment.length for segment in self.segments)

    def to(self, device: torch.device) -> MicroBatch:
        """The same row with its tensors on `device`, except what the host reads: the pixels, and the images' grids
        (`grid_thw_I3`)."""
        own: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        own.pop("grid_thw_I3")
        moved: dict[str, Any] = {
            name: to_device(value, device) for name, value in own.items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class HeadOutputs:
    """What the language-model head computes for the response tokens: fp32 nats, complete on every tensor rank."""

    policy_logprobs_R: Tensor
    """Log-probs of the response tokens."""
    entropy_R: Tensor | None = None
    """Entropy over the whole vocabulary, where it was requested."""
    masked_logprobs_R: Tensor | None = None
    """Log-probs of the same tokens under the masked image; joint rows only."""
    masked_entropy_R: Tensor | None = None
    """Entropy under the masked image, where it was requested; joint rows only."""
    perception_kl_R: Tensor | None = None
    """KL(policy || masked policy) over the whole vocabulary, where it was requested; joint rows only."""


Batch = tuple[MicroBatch, ...]
"""The micro-batches of one optimizer step on one data-parallel rank."""

Metrics = dict[str, tuple[float, float]]
"""name -> (numerator, count): both are summed over micro-batches and ranks, and divided once, at the end of the step.

The numerators of `loss/...` add up to the loss of one optimizer step; `pipeline.update_policy`, which knows when a step
is complete, gives them a count of 1. For names that end in `_max` the largest numerator counts instead of the sum, with
a count of 1.
"""

__all__ = [
    "Batch",
    "Group",
    "HeadOutputs",
    "Metrics",
    "MicroBatch",
    "ModelInputs",
    "Prompt",
    "Rollout",
    "Segment",
    "to_device",
]
