"""What a vLLM engine of this process computes for one prompt.

Positions and angles are what its attention gets: the rotary module is asked to turn unit vectors by the positions that
its first layer was given. A layer's output is the sum of two, since vLLM adds the residual in the next layer.
Left out: layers of the vision tower, which vLLM calls past any hook.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_papo.generation.generator import Sampling
from megatron_papo.generation.requests import Answer
from megatron_papo.generation.vllm.vllm_engine import VllmGenerator
from megatron_papo.parity.reading import (
    ANGLES,
    LANGUAGE_LAYER,
    POSITION_IDS,
    TOKEN_IDS,
    VISION_LAYER,
    ActivationRecorder,
    Places,
    note_layer,
    note_vision,
    places_of,
)
from megatron_papo.types import Prompt

_GRAPHS = "CUDA graphs"


def inspect_vllm(
    generator: VllmGenerator, prompt: Prompt, sampling: Sampling
) -> tuple[Answer, dict[str, Tensor], dict[str, str]]:
    """The answer, the parts by name, and why kinds of parts are missing."""
    (model,) = generator.llm.apply_model(_itself)
    eager = generator.llm.llm_engine.vllm_config.model_config.enforce_eager
    places = places_of(prompt, prompt.inputs.token_ids_S.numel() + sampling.max_response_tokens + 1)
    angles: list[Tensor] = []

    def read() -> None:
        if eager:
            angles.append(
                _angles(model.language_model.model.layers[0].self_attn.rotary_emb, recorder.parts()[POSITION_IDS])
            )

    with ActivationRecorder() as recorder:
        recorder.after(model.visual, lambda args, _, out: note_vision(recorder, args[0], out))
        if eager:
            _tape_language(recorder, model.language_model.model, places)
        answer = generator.answer_alone(prompt, sampling, read)
    parts = recorder.parts()
    missing = {VISION_LAYER: "vLLM calls them past any hook"}
    if eager:
        (parts[ANGLES],) = angles
    else:
        # the engine refuses an answer to any other prompt than the trainer's
        parts[TOKEN_IDS] = torch.cat((prompt.inputs.token_ids_S, torch.tensor(answer.response_ids)))
        missing |= dict.fromkeys((POSITION_IDS, ANGLES, LANGUAGE_LAYER), _GRAPHS)
    return answer, parts, missing


def _itself(model: Any) -> Any:
    return model


def _tape_language(recorder: ActivationRecorder, language: Any, places: Places) -> None:
    recorder.after(language.embed_tokens, lambda args, _, __: recorder.note(TOKEN_IDS, args[0].long()))
    recorder.after(language.layers[0], lambda args, _, __: recorder.note(POSITION_IDS, args[0].T))
    for number, layer in enumerate(language.layers):
        note_layer(recorder, layer, f"{LANGUAGE_LAYER} {number}", places, lambda out: out[0] + out[1])


@torch.inference_mode()
def _angles(rotary: Any, position_ids_T3: Tensor) -> Tensor:
    """[T, head_dim] cosines and sines: what the rotary module makes of vectors whose first half is one."""
    cache = rotary.cos_sin_cache
    unit_TD = torch.zeros(len(position_ids_T3), rotary.head_size, dtype=cache.dtype, device=cache.device)
    unit_TD[:, : rotary.head_size // 2] = 1.0
    turned_TD, _ = rotary(position_ids_T3.T.contiguous().to(cache.device), unit_TD, unit_TD.clone())
    return turned_TD.cpu()
