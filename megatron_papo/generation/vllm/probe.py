"""What a vLLM engine of this process computes for one prompt, seen by hooks on vLLM's own model.

Positions and angles are what its attention gets: the rotary module is asked to turn unit vectors by the positions that
the first layer was given. Left out: whatever CUDA graphs replay, which call no hook.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_papo.generation.readings import ActivationRecorder, Probe, probe_of
from megatron_papo.generation.requests import Answer
from megatron_papo.generation.vllm.family_module import VllmModule
from megatron_papo.model.observed import ANGLES, LANGUAGE_LAYER, POSITION_IDS, TOKEN_IDS
from megatron_papo.types import Prompt

if TYPE_CHECKING:
    from vllm import LLM

_CUDA_GRAPHS = "CUDA graphs"


def probe_engine(
    llm: LLM,
    in_vllm: VllmModule,
    prompt: Prompt,
    max_response_tokens: int,
    answer_alone: Callable[[Callable[[], None]], Answer],
) -> Probe:
    """Probes the engine while `answer_alone(read)` lets it answer `prompt`.

    `in_vllm` is the family's `engine_vllm`. `read` has to be called once the answer is there and before the engine
    sleeps, which takes its tensors out of reach.
    """
    (model,) = llm.apply_model(_itself)
    eager = llm.llm_engine.vllm_config.model_config.enforce_eager
    angles: list[Tensor] = []

    def read() -> None:
        if eager:
            angles.append(_angles(in_vllm.rotary_of(model), recorder.parts()[POSITION_IDS]))

    with ActivationRecorder() as recorder:
        recorder.observe(in_vllm.observed_vision(model), prompt, max_response_tokens)
        if eager:
            recorder.observe(in_vllm.observed_language(model), prompt, max_response_tokens)
        answer = answer_alone(read)
    parts = recorder.parts()
    missing = {}
    if eager:
        (parts[ANGLES],) = angles
    else:
        # the engine refuses an answer to any other prompt than the trainer's
        parts[TOKEN_IDS] = torch.cat((prompt.inputs.token_ids_S, torch.tensor(answer.response_ids)))
        missing = dict.fromkeys((POSITION_IDS, ANGLES, LANGUAGE_LAYER), _CUDA_GRAPHS)
    return probe_of(prompt, answer.response_ids, answer.logprobs, parts, missing)


def _itself(model: Any) -> Any:
    return model


@torch.inference_mode()
def _angles(rotary: Any, position_ids_T3: Tensor) -> Tensor:
    """[T, head_dim] cosines and sines: what the rotary module makes of vectors whose first half is one."""
    cache = rotary.cos_sin_cache
    unit_TD = torch.zeros(len(position_ids_T3), rotary.head_size, dtype=cache.dtype, device=cache.device)
    unit_TD[:, : rotary.head_size // 2] = 1.0
    turned_TD, _ = rotary(position_ids_T3.T.contiguous().to(cache.device), unit_TD, unit_TD.clone())
    return turned_TD.cpu()
