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
VISION_LAYER, FEATURES, LANGUAGE_LAYER, LOGPROBS = "vision layer", "image features", "language layer", "log-probs"
KINDS = (TOKEN_IDS, POSITION_IDS, ANGLES, PIXELS, VISION_LAYER, FEATURES, LANGUAGE_LAYER, LOGPROBS)
"""Kinds of parts, in the order in which a model computes them. The name of a layer is its kind and its number, counted
from 0: `language layer 3`."""


@dataclass(frozen=True)
class Observation:
    """Where one part is seen: after each call of `module`."""

    module: nn.Module
    values: Callable[[tuple, dict[str, Any], Any], Tensor]
    """(positional arguments, keyword arguments, output) of a call -> the part's values, tokens or patches first:
    token ids [T], position ids [T, axes], rotary angles [T, head_dim] (cosines, then sines, of half a head each), pixel
    values [P, patch_dim], hidden states and image features [T, width]."""


Observed = Mapping[str, Observation]
"""Name of a part -> where it is seen."""


def kind_of(part: str) -> str:
    """The kind of a part: its name without a layer's number."""
    return next(kind for kind in KINDS if part.startswith(kind))


def number_of(part: str) -> int:
    """The number of a layer; 0 for a part that is no layer."""
    return int(part.removeprefix(kind_of(part)).strip() or 0)
