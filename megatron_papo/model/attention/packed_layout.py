"""How the places of a packed row attend to each other: shared prompts, plain sequences, windows of the vision tower.

Each segment attends to itself, causally (language) or in full (a vision window, a frame). A response also attends to
all of the prompt that it shares with others. Two kinds of block make that up, and no T x T mask ever exists: segments
of similar length gathered into one right-padded batch, and the responses of a prompt against the prompt's keys.
Causal attention does not see the padding, since it lies to the right of all tokens; batches of full attention have
segments of one length only. The layout is computed once per micro-batch, for all layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from megatron_papo.model.attention.rotary import Rotation
from megatron_papo.model.attention.varlen import VarlenPlan
from megatron_papo.types import Segment, to_device

_MOST_PADDING = 0.05
"""The largest share of padding in a row's batches, relative to its tokens."""
_FILLS = (0.5, 0.7, 0.8, 0.9, 0.95, 1.0)
"""The shares of a batch's length that a segment must fill to join it. They are tried in this order until there is
little enough padding."""

Places = slice | Tensor


@dataclass(frozen=True)
class AttentionBlock:
    """A batch of segments of about one length, [sequences, length] places of the row. Each segment attends to
    itself."""

    size: tuple[int, int]
    places: Places
    """The place in the row of each place of the batch, [sequences * length]; padding repeats the segment's last
    token."""
    padded: Tensor | None
    """Which places of the batch are padding, [sequences * length] bool; None when none is."""


@dataclass(frozen=True)
class Segments:
    """How the T places of a row attend to each other."""

    qkv_format: ClassVar[str] = "row"
    """Megatron compares this with "thd", the name of its own packed format."""
    causal: bool
    blocks: tuple[AttentionBlock, ...]
    """Blocks of segments that attend to themselves; every place of the row is in exactly one."""
    prefixes: tuple[tuple[slice, slice], ...]
    """Pairs: the places of responses, and those of the prompt that they all see."""
    varlen: VarlenPlan | None
    """The same structure for variable-length kernels; None on the CPU."""
    rotation: Rotation | None
    """How queries and keys are rotated by their positions; None: not at all."""
    num_padding: int = 0
    """Places after the T that nothing attends to or from: attention is zero there, and so are its gradients."""
    image_places_M: Tensor | None = None
    """The places of image tokens, for a language model that adds to them after its first layers (`deepstack.py`)."""

    def of_layer(self, layer: int) -> Segments:
        """The structure in which layer `layer` (from 0) attends."""
        del layer
        return self


@dataclass(frozen=True)
class WindowedSegments:
    """The structure of a row in a vision tower: most layers attend within windows, some over whole frames."""

    qkv_format: ClassVar[str] = "row"
    windows: Segments
    frames: Segments
    frame_layers: frozenset[int]

    @property
    def num_padding(self) -> int:
        return self.frames.num_padding

    def of_layer(self, layer: int) -> Segments:
        return self.frames if layer in self.frame_layers else self.windows


def build_segments(
    segments: Sequence[Segment],
    *,
    causal: bool,
    device: torch.device,
    rotation: Rotation | None = None,
    num_padding: int = 0,
    image_places_M: Tensor | None = None,
) -> Segments:
    """The structure of a row with these segments, in row order; each has at least one token."""
    lengths = np.asarray([segment.length for segment in segments], dtype=np.int64)
    assert lengths.size and lengths.min() > 0, "a row is made of segments of at least one token"
    starts = np.concatenate([[0], lengths.cumsum()[:-1]])
    prefixes = tuple(_prefixes(segments, starts))
    assert causal or not prefixes
    blocks = tuple(_block(starts[members], lengths[members], device) for members in _batches(lengths, causal))
    varlen = VarlenPlan.of(lengths.tolist(), prefixes, causal, device) if device.type == "cuda" else None
    return Segments(causal, blocks, prefixes, varlen, rotation, num_padding, image_places_M)


def _prefixes(segments: Sequence[Segment], starts: np.ndarray) -> Iterator[tuple[slice, slice]]:
    """The pair of query places and key places for every run of neighbouring segments with the same parent."""
    for index, (segment, start) in enumerate(zip(segments, starts.tolist())):
        parent = segment.parent
        if parent is None or (index and segments[index - 1].parent == parent):
            continue
        assert segments[parent].parent is None and parent < index, "a prompt comes before its responses"
        end = start
        for follower in segments[index:]:
            if follower.parent != parent:
                break
            end += follower.length
        key_start = int(starts[parent])
        yield slice(start, end), slice(key_start, key_start + segments[parent].length)


def _batches(lengths: np.ndarray, causal: bool) -> list[np.ndarray]:
    """The segments of each batch: as few batches as the bound on padding allows."""
    for fill in _FILLS if causal else (1.0,):
        groups = _groups(lengths, fill)
        padding = sum(int(lengths[group].max()) * len(group) for group in groups) - int(lengths.sum())
        if padding <= _MOST_PADDING * lengths.sum():
            return groups
    raise AssertionError("equal lengths need no padding")


def _groups(lengths: np.ndarray, fill: float) -> list[np.ndarray]:
    """The segments of each batch when each fills the share `fill` of its length. The batch of the longest segments
    comes first; within a batch segments keep the order of the row."""
    order = np.argsort(-lengths, kind="stable")
    groups, begin = [], 0
    for place in range(1, len(order) + 1):
        if place == len(order) or lengths[order[place]] < fill * lengths[order[begin]]:
            groups.append(np.sort(order[begin:place]))
            begin = place
    return groups


def _block(starts: np.ndarray, lengths: np.ndarray, device: torch.device) -> AttentionBlock:
    longest = int(lengths.max())
    step = np.arange(longest)
    places = (starts[:, None] + np.minimum(step, lengths[:, None] - 1)).reshape(-1)
    padded = (step >= lengths[:, None]).reshape(-1)
    size, first = (len(lengths), longest), int(starts[0])
    if np.array_equal(places, np.arange(first, first + places.size)):
        return AttentionBlock(size, slice(first, first + places.size), None)
    return AttentionBlock(
        size,
        to_device(torch.from_numpy(places), device),
        to_device(torch.from_numpy(padded), device) if padded.any() else None,
    )
