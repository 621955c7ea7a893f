"""What one program computes for a prompt and a response, part by part, and how hooks collect it while a model runs.

`Reading` is what certificates compare; nothing is compared here. An engine may read a prompt in chunks and a response a
token at a time, so an `ActivationRecorder` joins the pieces. The names of parts stand in `model/observed.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from megatron_papo.config import Config
from megatron_papo.config.derived import engine_dtype
from megatron_papo.distributed import accelerator
from megatron_papo.model.observed import (
    ANGLES,
    LANGUAGE_LAYER,
    LOGPROBS,
    POSITION_EMBEDDINGS,
    POSITION_IDS,
    TOKEN_IDS,
    VISION_LAYER,
    Observation,
    Observed,
    kind_of,
)
from megatron_papo.types import Prompt

Precision = Literal["float32", "bfloat16", "fp8"]
MOST_PLACES = 96
"""The most tokens of a prompt, and the most patches, at which layers are kept; tokens of the response are all kept."""


@dataclass(frozen=True)
class Reading:
    """What one party makes of one prompt and the response to it."""

    parts: dict[str, Tensor]
    """Values by name of the part; tokens (patches, response tokens) first; in host memory, in the type in which they
    were computed."""
    missing: dict[str, str] = field(default_factory=dict)
    """Kind of part -> why it was not looked at."""


@dataclass(frozen=True)
class Probe:
    """What an engine lets be seen of one prompt that it answered by itself."""

    response_ids: tuple[int, ...]
    reading: Reading


@dataclass(frozen=True)
class Places:
    """Which of the `total` places of a sequence are kept: evenly spread ones of the first `num_spread`, then all."""

    num_spread: int
    total: int

    def within(self, start: int, stop: int) -> Tensor:
        """The kept places from `start` to `stop`, counted from `start`."""
        spread = torch.linspace(0, self.num_spread - 1, min(self.num_spread, MOST_PLACES)).round().long()
        kept = torch.cat((spread, torch.arange(self.num_spread, self.total)))
        return kept[(kept >= start) & (kept < stop)] - start


class ActivationRecorder:
    """Collects by hooks, part by part, what modules compute. As a context it removes its hooks at the end."""

    def __init__(self) -> None:
        self._pieces: dict[str, list[Tensor]] = {}
        self._num_seen: dict[str, int] = {}
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

    def before(self, module: nn.Module, note: Callable[[tuple, dict[str, Any], None], None]) -> None:
        """Calls `note(args, kwargs, None)` whenever `module` is about to run."""
        self._handles.append(
            module.register_forward_pre_hook(lambda _, args, kwargs: note(args, kwargs, None), with_kwargs=True)
        )

    def note(self, name: str, values: Tensor, places: Places | None = None, start: int | None = None) -> None:
        """Adds the next rows of a part, or the rows from `start` on; copied, since engines reuse their buffers."""
        if places is not None:
            first = self._num_seen.get(name, 0) if start is None else start
            self._num_seen[name] = first + len(values)
            values = values.index_select(0, places.within(first, first + len(values)).to(values.device))
        self._pieces.setdefault(name, []).append(values.detach().to("cpu", copy=True))

    def observe(self, observed: Observed, prompt: Prompt, max_response_tokens: int) -> None:
        """Records the `observed` parts of a model that is about to answer `prompt`, of layers at some places only."""
        tokens = places_of(prompt, prompt.inputs.token_ids_S.numel() + max_response_tokens + 1)
        patches = patches_of(prompt)
        places = {LANGUAGE_LAYER: tokens, VISION_LAYER: patches, POSITION_EMBEDDINGS: patches}
        for part, each in observed.items():
            watch = self.before if each.before else self.after
            watch(each.module, partial(self._note_part, part, each, places.get(kind_of(part))))

    def _note_part(self, part: str, observation: Observation, places: Places | None, *call: Any) -> None:
        """Notes a part at one call of its module: `call` has its arguments, keyword arguments and output."""
        self.note(part, observation.values(*call), places)

    def parts(self) -> dict[str, Tensor]:
        """Everything recorded so far, by name of the part."""
        return {name: torch.cat(pieces) for name, pieces in self._pieces.items()}


def places_of(prompt: Prompt, num_tokens: int) -> Places:
    """The places at which language layers are kept, of a prompt with its response, `num_tokens` in all.

    The last token is left out: no engine continues from it.
    """
    return Places(prompt.inputs.token_ids_S.numel(), num_tokens - 1)


def patches_of(prompt: Prompt) -> Places:
    """The places at which layers of the vision tower, and what enters the first, are kept."""
    grid_thw_I3 = prompt.inputs.grid_thw_I3
    num_patches = 0 if grid_thw_I3 is None else int(grid_thw_I3.prod(dim=1).sum())
    return Places(num_patches, num_patches)


def probe_of(
    prompt: Prompt,
    response_ids: tuple[int, ...],
    logprobs: tuple[float, ...],
    parts: dict[str, Tensor],
    missing: dict[str, str],
) -> Probe:
    """An engine's answer to `prompt` with the parts that were recorded meanwhile.

    An engine may be a token ahead when it learns that a response has ended; what it computed for that is cut off.
    """
    num_tokens = prompt.inputs.token_ids_S.numel() + len(response_ids)
    num_kept = len(places_of(prompt, num_tokens).within(0, num_tokens))
    for name, values in parts.items():
        if name in (TOKEN_IDS, POSITION_IDS, ANGLES):
            parts[name] = values[: num_tokens - 1]
        elif name.startswith(LANGUAGE_LAYER):
            parts[name] = values[:num_kept]
    return Probe(response_ids, Reading(parts | {LOGPROBS: torch.tensor(logprobs)}, missing))


def engine_precision(config: Config) -> Precision:
    """What the engine computes in."""
    if config.generation.quantization == "fp8":
        return "fp8"
    return cast(Precision, str(accelerator.parameter_dtype(engine_dtype(config))).removeprefix("torch."))
