"""How the places of a packed row attend to each other: shared prompts, plain sequences, windows of the vision tower.

Each segment attends to itself, causally (language) or in full (a vision window, a frame), and a response also to all of
the prompt that it shares with others. Two kinds of block make that up, and no T x T mask ever exists: segments of
similar length gathered into one right-padded batch, and the responses of a prompt against the prompt's keys. Padded
places lie to the right of all real ones, which causal attention never sees; batches of full attention hold equal
lengths only. Laid out once a micro-batch, for all layers.
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
"""Padded places of a row's batches, as a share of its tokens."""
_FILLS = (0.5, 0.7, 0.8, 0.9, 0.95, 1.0)
"""A segment joins a batch when it fills at least this share of its length: the first that pads little enough."""

Places = slice | Tensor


@dataclass(frozen=True)
class AttentionBlock:
    """Segments of about one length, [sequences, length] places of the row, each attending to itself."""

    size: tuple[int, int]
    places: Places
    """Of every padded place, the place in the row; padding repeats the segment's last token."""
    padded: Tensor | None
    """Which of them are padding, [sequences * length] bool; None when none is."""


@dataclass(frozen=True)
class Segments:
    """How the T places of a row attend to each other."""

    qkv_format: ClassVar[str] = "row"
    """Megatron asks whether this is "thd", its own packed format; no."""
    causal: bool
    blocks: tuple[AttentionBlock, ...]
    """Every place of the row is in one."""
    prefixes: tuple[tuple[slice, slice], ...]
    """(places of responses, places of the prompt that they all see)."""
    varlen: VarlenPlan | None
    """The same for variable-length kernels, on a GPU."""
    rotation: Rotation | None
    """Of queries and keys by their positions."""
    num_padding: int = 0
    """Places after the T that nothing attends to or from: attention is zero there, and so are its gradients."""

    def of_layer(self, layer: int) -> Segments:
        """What layer `layer` (from 0) attends within."""
        del layer
        return self


@dataclass(frozen=True)
class WindowedSegments:
    """The vision tower's: most layers attend within windows, some over whole frames."""

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
) -> Segments:
    """Lays out the blocks of a row, given its segments (of at least one token each) in row order."""
    lengths = np.asarray([segment.length for segment in segments], dtype=np.int64)
    assert lengths.size and lengths.min() > 0, "a row is made of segments of at least one token"
    starts = np.concatenate([[0], lengths.cumsum()[:-1]])
    prefixes = tuple(_prefixes(segments, starts))
    assert causal or not prefixes
    blocks = tuple(_block(starts[members], lengths[members], device) for members in _batches(lengths, causal))
    varlen = VarlenPlan.of(lengths.tolist(), prefixes, causal, device) if device.type == "cuda" else None
    return Segments(causal, blocks, prefixes, varlen, rotation, num_padding)


def _prefixes(segments: Sequence[Segment], starts: np.ndarray) -> Iterator[tuple[slice, slice]]:
    """One for every run of segments that follow one another and share a parent."""
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
    """Members of each batch: as few batches as the bound on padding allows."""
    for fill in _FILLS if causal else (1.0,):
        groups = _groups(lengths, fill)
        padding = sum(int(lengths[group].max()) * len(group) for group in groups) - int(lengths.sum())
        if padding <= _MOST_PADDING * lengths.sum():
            return groups
    raise AssertionError("equal lengths need no padding")


def _groups(lengths: np.ndarray, fill: float) -> list[np.ndarray]:
    """Longest batch first; a batch's members in the order of the row."""
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
