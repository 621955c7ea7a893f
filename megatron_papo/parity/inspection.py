"""What an engine computes on the way to a response: hooks on its own model while it answers one prompt alone.

Left out: an engine in other processes, of which no more is seen than its answers, and layers that CUDA graphs replay,
which call no hook.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from megatron_papo.config import Config
from megatron_papo.distributed import accelerator
from megatron_papo.generation.generator import Generator, Sampling
from megatron_papo.generation.requests import Answer, make_requests
from megatron_papo.generation.transformers.transformers_engine import TransformersGenerator
from megatron_papo.generation.vllm.vllm_engine import VllmGenerator
from megatron_papo.parity.reading import (
    ANGLES,
    KINDS,
    LANGUAGE_LAYER,
    LOGPROBS,
    POSITION_IDS,
    TOKEN_IDS,
    VISION_LAYER,
    ActivationRecorder,
    Precision,
    Reading,
    note_layer,
    note_vision,
    patches_of,
    places_of,
)
from megatron_papo.parity.vllm_inspection import inspect_vllm
from megatron_papo.types import Prompt


def precision_of(config: Config) -> Precision:
    """Of the engine."""
    generation = config.generation
    if generation.quantization == "fp8":
        return "fp8"
    dtype = config.model.dtype if generation.dtype == "auto" else generation.dtype
    return cast(Precision, str(accelerator.parameter_dtype(dtype)).removeprefix("torch."))


def inspect(generator: Generator, prompt: Prompt, sampling: Sampling) -> tuple[Answer, Reading]:
    """One rollout of `prompt`, which this rank's own engine makes of it alone, and what it computed for it.

    All ranks call it together, with the same prompt. Raises EngineLost as `generate` does.
    """
    if isinstance(generator, TransformersGenerator):
        with tape_transformers(generator.model, prompt, sampling.max_response_tokens) as recorder:
            answer = generator.answer_alone(prompt, sampling)
        return answer, _engine_reading(recorder.parts(), answer, prompt, {})
    if isinstance(generator, VllmGenerator):
        answer, parts, missing = inspect_vllm(generator, prompt, sampling)
        return answer, _engine_reading(parts, answer, prompt, missing)
    return _answered(generator, prompt, sampling)


def _answered(generator: Generator, prompt: Prompt, sampling: Sampling) -> tuple[Answer, Reading]:
    """Of an engine in other processes: its answer alone."""
    (group,) = generator.generate([prompt], sampling)
    rollout = group.rollouts[0]
    answer = Answer(
        make_requests([prompt], sampling)[0], rollout.response_ids, rollout.rollout_logprobs, rollout.finish_reason
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
def tape_transformers(model: Any, prompt: Prompt, max_response_tokens: int) -> Iterator[ActivationRecorder]:
    """Records a Qwen2_5_VLForConditionalGeneration of transformers while it runs on one sequence."""
    language, vision = model.model.language_model, model.model.visual
    places = places_of(prompt, prompt.inputs.token_ids_S.numel() + max_response_tokens + 1)
    patches = patches_of(prompt)
    with ActivationRecorder() as recorder:
        recorder.after(language.rotary_emb, lambda args, _, out: _note_rotation(recorder, args[1], out))
        recorder.after(language.embed_tokens, lambda args, _, __: recorder.note(TOKEN_IDS, args[0][0]))
        recorder.after(vision, lambda args, _, out: note_vision(recorder, args[0], out.pooler_output))
        for number, layer in enumerate(vision.blocks):
            note_layer(recorder, layer, f"{VISION_LAYER} {number}", patches, lambda out: out)
        for number, layer in enumerate(language.layers):
            note_layer(recorder, layer, f"{LANGUAGE_LAYER} {number}", places, lambda out: out[0])
        yield recorder


def _note_rotation(recorder: ActivationRecorder, position_ids_31T: Tensor, cos_and_sin: tuple[Tensor, Tensor]) -> None:
    recorder.note(POSITION_IDS, position_ids_31T[-3:, 0].T)
    recorder.note(ANGLES, torch.cat([part[0].chunk(2, -1)[0] for part in cos_and_sin], dim=-1))
