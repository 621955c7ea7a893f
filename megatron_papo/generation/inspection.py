"""What an engine computes on the way to a response: hooks on its own model while it answers one prompt alone.

`Reading` is what any party makes of a prompt and a response, part by part; a certificate holds readings against each
other. Here are the parts that only engines know, of both kinds, and `Tape`, which collects pieces as a model runs: a
prompt may be read in chunks and its response a token at a time. Nothing is compared here. Left out: an engine in other
processes, of which no more is seen than its answers, and layers that CUDA graphs replay, which call no hook.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from megatron_papo import accelerator
from megatron_papo.config import Config
from megatron_papo.generation.base import Generator, Sampling
from megatron_papo.generation.shares import Answer
from megatron_papo.generation.transformers_engine import TransformersGenerator
from megatron_papo.generation.vllm_engine import VllmGenerator
from megatron_papo.types import Prompt

TOKEN_IDS, POSITION_IDS, ANGLES, PIXELS = "token ids", "position ids", "rotary angles", "pixel values"
VISION_LAYER, FEATURES, LANGUAGE_LAYER, LOGPROBS = "vision layer", "image features", "language layer", "log-probs"
KINDS = (TOKEN_IDS, POSITION_IDS, ANGLES, PIXELS, VISION_LAYER, FEATURES, LANGUAGE_LAYER, LOGPROBS)
"""Parts of a reading in the order in which a model computes them. Layers carry their number, from 0, behind the name."""
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


class Tape:
    """Pieces that hooks note, by part. As a context it takes its hooks off again."""

    def __init__(self) -> None:
        self._pieces: dict[str, list[Tensor]] = {}
        self._seen: dict[str, int] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Tape:
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


def precision_of(config: Config) -> str:
    """Of the engine: `float32`, `bfloat16` or `fp8`."""
    generation = config.generation
    if generation.quantization == "fp8":
        return "fp8"
    dtype = config.model.dtype if generation.dtype == "auto" else generation.dtype
    return str(accelerator.parameter_dtype(dtype)).removeprefix("torch.")


def inspect(generator: Generator, prompt: Prompt, sampling: Sampling) -> tuple[Answer, Reading]:
    """One rollout of `prompt`, which this rank's own engine makes of it alone, and what it computed for it.

    All ranks call it together, with the same prompt. Raises EngineLost as `generate` does.
    """
    if isinstance(generator, TransformersGenerator):
        with tape_transformers(generator.model, prompt, sampling.max_response_tokens) as tape:
            answer = generator.answer_alone(prompt, sampling)
        return answer, _engine_reading(tape.parts(), answer, prompt, {})
    if isinstance(generator, VllmGenerator):
        from megatron_papo.generation.vllm_inspection import inspect_vllm

        answer, parts, missing = inspect_vllm(generator, prompt, sampling)
        return answer, _engine_reading(parts, answer, prompt, missing)
    return _answered(generator, prompt, sampling)


def _answered(generator: Generator, prompt: Prompt, sampling: Sampling) -> tuple[Answer, Reading]:
    """Of an engine in other processes: its answer alone."""
    from megatron_papo.generation.shares import make_jobs

    (group,) = generator.generate([prompt], sampling)
    rollout = group.rollouts[0]
    answer = Answer(
        make_jobs([prompt], sampling)[0], rollout.response_ids, rollout.rollout_logprobs, rollout.finish_reason
    )
    missing = dict.fromkeys((kind for kind in KINDS if kind != LOGPROBS), "the engine runs in other processes")
    return answer, _engine_reading({}, answer, prompt, missing)


def _engine_reading(parts: dict[str, Tensor], answer: Answer, prompt: Prompt, missing: dict[str, str]) -> Reading:
    """An engine may be a token ahead when it hears that a response has ended."""
    num_tokens = prompt.inputs.token_ids_S.numel() + len(answer.response_ids)
    num_kept = len(places_of(prompt, num_tokens).within(0, num_tokens))
    for name, values in parts.items():
        if name in (TOKEN_IDS, POSITION_IDS, ANGLES):
            parts[name] = values[: num_tokens - 1]
        elif name.startswith(LANGUAGE_LAYER):
            parts[name] = values[:num_kept]
    return Reading(parts | {LOGPROBS: torch.tensor(answer.logprobs)}, missing)


@contextmanager
def tape_transformers(model: Any, prompt: Prompt, max_response_tokens: int) -> Iterator[Tape]:
    """Records a Qwen2_5_VLForConditionalGeneration of transformers while it runs on one sequence."""
    language, vision = model.model.language_model, model.model.visual
    places = places_of(prompt, prompt.inputs.token_ids_S.numel() + max_response_tokens + 1)
    patches = patches_of(prompt)
    with Tape() as tape:
        tape.after(language.rotary_emb, lambda args, _, out: _note_rotation(tape, args[1], out))
        tape.after(language.embed_tokens, lambda args, _, __: tape.note(TOKEN_IDS, args[0][0]))
        tape.after(vision, lambda args, _, out: _note_vision(tape, args[0], out.pooler_output))
        for number, layer in enumerate(vision.blocks):
            note_layer(tape, layer, f"{VISION_LAYER} {number}", patches, lambda out: out)
        for number, layer in enumerate(language.layers):
            note_layer(tape, layer, f"{LANGUAGE_LAYER} {number}", places, lambda out: out[0])
        yield tape


def note_layer(tape: Tape, layer: nn.Module, name: str, places: Places, rows: Callable[[Any], Tensor]) -> None:
    """Keeps what `rows` makes of the layer's output, [tokens, width]."""
    tape.after(layer, lambda _, __, out: tape.note(name, rows(out), places))


def _note_rotation(tape: Tape, position_ids_31T: Tensor, cos_and_sin: tuple[Tensor, Tensor]) -> None:
    tape.note(POSITION_IDS, position_ids_31T[-3:, 0].T)
    tape.note(ANGLES, torch.cat([part[0].chunk(2, -1)[0] for part in cos_and_sin], dim=-1))


def _note_vision(tape: Tape, pixel_values_PD: Tensor, features_MH: Tensor) -> None:
    tape.note(PIXELS, pixel_values_PD)
    tape.note(FEATURES, features_MH)
