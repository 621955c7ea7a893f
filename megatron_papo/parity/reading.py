"""What one party computes of a prompt and a response, part by part, and how hooks collect it while a model runs.

`Reading` is what certificates hold against each other; nothing is compared here. A prompt may be read in chunks and its
response a token at a time, so a `ActivationRecorder` puts pieces together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from megatron_papo.types import Prompt

TOKEN_IDS, POSITION_IDS, ANGLES, PIXELS = "token ids", "position ids", "rotary angles", "pixel values"
VISION_LAYER, FEATURES, LANGUAGE_LAYER, LOGPROBS = "vision layer", "image features", "language layer", "log-probs"
KINDS = (TOKEN_IDS, POSITION_IDS, ANGLES, PIXELS, VISION_LAYER, FEATURES, LANGUAGE_LAYER, LOGPROBS)
"""Parts of a reading, in the order in which a model computes them. Layers carry their number behind it, from 0."""
Precision = Literal["float32", "bfloat16", "fp8"]
MOST_PLACES = 96
"""Of a prompt's tokens, and of its patches, at which layers are kept; those of the response all are."""


@dataclass(frozen=True)
class Reading:
    """What one party makes of one prompt and the response to it."""

    parts: dict[str, Tensor]
    """By name, tokens (patches, response tokens) first; in host memory, in the type in which they were computed.
    `rotary angles` are cosines, then sines."""
    missing: dict[str, str] = field(default_factory=dict)
    """Kind of part -> why it was not looked at."""


@dataclass(frozen=True)
class Places:
    """Which of `total` places of a sequence are kept: evenly spread ones of the first `num_spread`, then all."""

    num_spread: int
    total: int

    def within(self, start: int, stop: int) -> Tensor:
        """Those from `start` to `stop`, counted from `start`."""
        spread = torch.linspace(0, self.num_spread - 1, min(self.num_spread, MOST_PLACES)).round().long()
        kept = torch.cat((spread, torch.arange(self.num_spread, self.total)))
        return kept[(kept >= start) & (kept < stop)] - start


class ActivationRecorder:
    """Pieces that hooks note, by part. As a context it takes its hooks off again."""

    def __init__(self) -> None:
        self._pieces: dict[str, list[Tensor]] = {}
        self._seen: dict[str, int] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> ActivationRecorder:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def after(self, module: nn.Module, note: Callable[[tuple, dict[str, Any], Any], None]) -> None:
        """Calls `note(args, kwargs, output)` whenever `module` has run."""
        self._handles.append(
            module.register_forward_hook(lambda _, args, kwargs, out: note(args, kwargs, out), with_kwargs=True)
        )

    def note(self, name: str, values: Tensor, places: Places | None = None, start: int | None = None) -> None:
        """The next rows of a part, or those from `start` on; copied, since engines reuse their buffers."""
        if places is not None:
            first = self._seen.get(name, 0) if start is None else start
            self._seen[name] = first + len(values)
            values = values.index_select(0, places.within(first, first + len(values)).to(values.device))
        self._pieces.setdefault(name, []).append(values.detach().to("cpu", copy=True))

    def parts(self) -> dict[str, Tensor]:
        return {name: torch.cat(pieces) for name, pieces in self._pieces.items()}


def places_of(prompt: Prompt, num_tokens: int) -> Places:
    """Of a prompt with its response, `num_tokens` in all. The last token is left out: no engine goes on from it."""
    return Places(prompt.inputs.token_ids_S.numel(), num_tokens - 1)


def patches_of(prompt: Prompt) -> Places:
    grid_thw_I3 = prompt.inputs.grid_thw_I3
    num_patches = 0 if grid_thw_I3 is None else int(grid_thw_I3.prod(dim=1).sum())
    return Places(num_patches, num_patches)


def note_layer(
    recorder: ActivationRecorder, layer: nn.Module, name: str, places: Places, rows: Callable[[Any], Tensor]
) -> None:
    """Keeps what `rows` makes of the layer's output, [tokens, width]."""
    recorder.after(layer, lambda _, __, out: recorder.note(name, rows(out), places))


def note_vision(recorder: ActivationRecorder, pixel_values_PD: Tensor, features_MH: Tensor) -> None:
    recorder.note(PIXELS, pixel_values_PD)
    recorder.note(FEATURES, features_MH)
