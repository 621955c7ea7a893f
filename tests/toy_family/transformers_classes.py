"""transformers' classes of the toy family, as a `TransformersModule` (generation/reference_model.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, Cache

from megatron_papo.model.observed import (
    ANGLES,
    FEATURES,
    LANGUAGE_LAYER,
    PIXELS,
    POSITION_IDS,
    TOKEN_IDS,
    VISION_LAYER,
    Observation,
    Observed,
)
from tests.toy_family.positions import prompt_positions
from tests.toy_family.reference import Toy, ToyConfig

CONFIG_CLASS = ToyConfig
MODEL_CLASS = Toy

AutoConfig.register(CONFIG_CLASS.model_type, CONFIG_CLASS)  # transformers looks config.json up for a tokenizer too


def max_positions(config: ToyConfig) -> int:
    return 2048


def position_ids(
    model: Toy, token_ids_BS: Tensor, grid_thw_I3: Tensor | None, attention_mask_BS: Tensor | None = None
) -> Tensor:
    mask_BS = torch.ones_like(token_ids_BS) if attention_mask_BS is None else attention_mask_BS
    positions_3BS = torch.zeros(3, *token_ids_BS.shape, dtype=torch.int64)
    for row, (ids_S, is_token_S) in enumerate(zip(token_ids_BS, mask_BS.bool())):
        ids = ids_S[is_token_S]
        positions_3BS[:, row, is_token_S] = prompt_positions(ids, grid_thw_I3, model.config)
        if grid_thw_I3 is not None:  # the images of the rows after this one
            grid_thw_I3 = grid_thw_I3[(ids == model.config.vision_start_token_id).sum() :]
    return positions_3BS


def forward(
    model: Toy,
    token_ids_BS: Tensor,
    position_ids_3BS: Tensor,
    *,
    pixel_values_PD: Tensor | None = None,
    grid_thw_I3: Tensor | None = None,
    attention_mask_BK: Tensor | None = None,
    cache: Cache | None = None,
    num_logits: int = 1,
) -> Tensor:
    logits_BSV = model(
        input_ids=token_ids_BS,
        pixel_values=pixel_values_PD,
        image_grid_thw=grid_thw_I3,
        position_ids=position_ids_3BS,
        attention_mask=attention_mask_BK,
        past_key_values=cache,
    ).logits
    return logits_BSV[:, -num_logits:]


def observed(model: Toy) -> Observed:
    parts = {
        TOKEN_IDS: Observation(model.words, lambda args, _, __: args[0][0]),
        POSITION_IDS: Observation(model.rotary, lambda args, _, __: args[0][:, 0].T),
        ANGLES: Observation(model.rotary, lambda _, __, angles: torch.cat([angles[0].cos(), angles[0].sin()], dim=-1)),
        PIXELS: Observation(model.tower, lambda args, _, __: args[0]),
        FEATURES: Observation(model.tower, lambda _, __, output: output),
    }
    layers = {f"{VISION_LAYER} {n}": Observation(layer, _whole) for n, layer in enumerate(model.tower.blocks)}
    layers |= {f"{LANGUAGE_LAYER} {n}": Observation(layer, _first) for n, layer in enumerate(model.decoder)}
    return parts | layers


def _whole(_: tuple, __: dict[str, Any], output_PH: Tensor) -> Tensor:
    return output_PH


def _first(_: tuple, __: dict[str, Any], output_1SH: Tensor) -> Tensor:
    """The one sequence of the batch."""
    return output_1SH[0]
