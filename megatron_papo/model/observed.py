"""The parts of a forward pass that can be observed, and where a model written by others shows them.

A family's `transformers_classes` and `engine_vllm` say, for each part, which module computes it and how its values are
taken from one call of that module. The rooms `generation` and `parity` attach the hooks and
compare the values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

TOKEN_IDS, POSITION_IDS, ANGLES, PIXELS = "token ids", "position ids", "rotary angles", "pixel values"
POSITION_EMBEDDINGS, VISION_LAYER, LEVEL = "position embeddings", "vision layer", "DeepStack level"
FEATURES, LANGUAGE_LAYER, LOGPROBS = "image features", "language layer", "log-probs"
KINDS = (
    TOKEN_IDS,
    POSITION_IDS,
    ANGLES,
    PIXELS,
    POSITION_EMBEDDINGS,
    VISION_LAYER,
    LEVEL,
    FEATURES,
    LANGUAGE_LAYER,
    LOGPROBS,
)
"""Kinds of parts, in the order in which a model computes them. The name of a layer or a level is its kind and its
number, counted from 0: `language layer 3`. Not every model has every kind: position embeddings (the embedded patches
with learned positions added) and levels of DeepStack are those of a tower that has them."""


@dataclass(frozen=True)
class Observation:
    """Where one part is seen: after each call of `module`, or before it."""

    module: nn.Module
    values: Callable[[tuple, dict[str, Any], Any], Tensor]
    """(positional arguments, keyword arguments, output) of a call -> the part's values, tokens or patches first:
    token ids [T], position ids [T, axes], rotary angles [T, head_dim] (cosines, then sines, of half a head each), pixel
    values [P, patch_dim], hidden states, levels and image features [T, width]."""
    before: bool = False
    """Whether the part is taken from the arguments before the module runs, which may write over them; the output is
    None then."""


Observed = Mapping[str, Observation]
"""Name of a part -> where it is seen."""


def kind_of(part: str) -> str:
    """The kind of a part: its name without a layer's number."""
    return next(kind for kind in KINDS if part.startswith(kind))


def number_of(part: str) -> int:
    """The number of a layer or a level; 0 for any other part."""
    return int(part.removeprefix(kind_of(part)).strip() or 0)
