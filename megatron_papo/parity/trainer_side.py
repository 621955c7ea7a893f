"""The trainer's side of a certificate: hooks on Megatron's layers while a plain row goes through the real schedule.

Each pipeline stage notes its own layers, under sequence parallelism each tensor rank the places of its own shard. What
padding the layout adds is left out. Hooks exchange nothing, so that a rank that fails in one leaves no other waiting
within the model; the pieces are put together afterwards, on every rank of the model-parallel group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_papo.distributed.accelerator import parameter_dtype
from megatron_papo.distributed.exchange import gather_objects
from megatron_papo.generation.readings import (
    ActivationRecorder,
    Places,
    Precision,
    Reading,
    patches_of,
    places_of,
)
from megatron_papo.model.observed import (
    ANGLES,
    FEATURES,
    LANGUAGE_LAYER,
    LEVEL,
    LOGPROBS,
    PIXELS,
    POSITION_EMBEDDINGS,
    POSITION_IDS,
    TOKEN_IDS,
    VISION_LAYER,
)
from megatron_papo.model.policy import HeadRequest
from megatron_papo.model.vision_tower import ImageTokens
from megatron_papo.optimization.pipeline import score
from megatron_papo.packing import supervised_group
from megatron_papo.training.batching import pack_rows
from megatron_papo.training.session import Run
from megatron_papo.types import MicroBatch, Prompt


def trainer_precision(run: Run) -> Precision:
    """What the passes that score compute in; for a run that has left FP8, what it computes in now."""
    if run.policy.fp8.allowed and run.config.fp8.score:
        return "fp8"
    return "bfloat16" if parameter_dtype(run.config.model.dtype) == torch.bfloat16 else "float32"


def read_trainer(run: Run, prompt: Prompt, response_ids: tuple[int, ...]) -> Reading:
    """What the trainer computes for the prompt and the response to it.

    All ranks of a model-parallel group call it with the same prompt and response, and get the same.
    """
    (row,) = pack_rows(run, [supervised_group(prompt, response_ids)])
    with ActivationRecorder() as recorder:
        _record(recorder, run, prompt, row)
        (outputs,) = score(run.policy, [row], HeadRequest(banned_ids=run.banned_ids))
    pieces = gather_objects(recorder.parts(), run.layout.model_group)
    parts = {name: torch.cat([piece[name] for piece in pieces if name in piece]) for name in _names(pieces)}
    parts |= _inputs_of(row) | {LOGPROBS: outputs.policy_logprobs_R.cpu()}
    return Reading(parts)


def _names(pieces: list[dict[str, Tensor]]) -> set[str]:
    return {name for piece in pieces for name in piece}


def _inputs_of(row: MicroBatch) -> dict[str, Tensor]:
    last = row.num_tokens - 1
    parts = {TOKEN_IDS: row.token_ids_T[:last], POSITION_IDS: row.position_ids_3T.T[:last]}
    return parts | ({PIXELS: torch.cat(row.pixel_values)} if row.pixel_values else {})


def _record(recorder: ActivationRecorder, run: Run, prompt: Prompt, row: MicroBatch) -> None:
    """Attaches this rank's hooks: to its own shards, and on the first tensor rank to what all tensor ranks compute."""
    policy, layout = run.policy, run.layout
    if layout.tensor_rank == 0 and layout.is_first_stage:
        assert policy.vision is not None
        recorder.after(policy.vision, lambda _, __, out: recorder.note(FEATURES, out.tokens_MH))
        layer = policy.language.decoder.layers[0]
        recorder.after(layer, lambda _, kwargs, __: recorder.note(ANGLES, _angles(kwargs, row.num_tokens - 1)))
    if layout.tensor_rank == 0 or run.config.parallel.sequence:
        if policy.vision is not None:
            recorder.after(policy.vision, lambda _, __, out: _note_levels(recorder, out, run))
            if run.shape.vision.position_edge:
                _record_positioned(recorder, policy.vision.decoder.layers[0], patches_of(prompt), run)
            for layer in policy.vision.decoder.layers:
                _record_layer(recorder, layer, VISION_LAYER, patches_of(prompt), run)
        for layer in policy.language.decoder.layers:
            _record_layer(recorder, layer, LANGUAGE_LAYER, places_of(prompt, row.num_tokens), run)


def _record_layer(recorder: ActivationRecorder, layer: Any, kind: str, places: Places, run: Run) -> None:
    name = f"{kind} {layer.layer_number - 1}"  # Megatron counts from 1, over all stages

    def note(args: tuple, kwargs: dict[str, Any], output: tuple[Tensor, Any]) -> None:
        shard_TH = output[0].squeeze(1)
        recorder.note(name, shard_TH, places, start=_first_place(len(shard_TH), run))

    recorder.after(layer, note)


def _record_positioned(recorder: ActivationRecorder, first_layer: Any, places: Places, run: Run) -> None:
    """The patches that enter the vision tower's first layer, their positions added."""

    def note(_: tuple, kwargs: dict[str, Any], __: None) -> None:
        shard_PH = kwargs["hidden_states"].squeeze(1)
        recorder.note(POSITION_EMBEDDINGS, shard_PH, places, start=_first_place(len(shard_PH), run))

    recorder.before(first_layer, note)


def _note_levels(recorder: ActivationRecorder, images: ImageTokens, run: Run) -> None:
    """This rank's share of each level, without the padding at the end."""
    for number, level_M1H in enumerate(() if images.levels_LM1H is None else images.levels_LM1H):
        num_left = len(images.tokens_MH) - _first_place(len(level_M1H), run)
        recorder.note(f"{LEVEL} {number}", level_M1H.squeeze(1)[: max(num_left, 0)])


def _first_place(num_own: int, run: Run) -> int:
    """Where this rank's shard of the row begins."""
    return run.layout.tensor_rank * num_own if run.config.parallel.sequence else 0


def _angles(kwargs: dict[str, Any], num_tokens: int) -> Tensor:
    rotation = kwargs["packed_seq_params"].rotation
    return torch.cat((rotation.cos_T1F, rotation.sin_T1F), dim=-1).squeeze(1)[:num_tokens]
