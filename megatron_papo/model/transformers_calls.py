"""How transformers' vision-language models with M-RoPE are called: one way for all families whose model has
`get_rope_index` and takes `pixel_values` with `image_grid_thw`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from megatron_papo.model.observed import (
    ANGLES,
    FEATURES,
    LANGUAGE_LAYER,
    PIXELS,
    POSITION_IDS,
    TOKEN_IDS,
    VISION_LAYER,
    Observation,
)


def position_ids(
    model: Any,
    token_ids_BS: Tensor,
    grid_thw_I3: Tensor | None,
    attention_mask_BS: Tensor | None = None,
) -> Tensor:
    """M-RoPE positions [3, B, S] of a batch of B sequences, as transformers counts them."""
    positions_3BS, _ = model.model.get_rope_index(
        token_ids_BS,
        mm_token_type_ids=(token_ids_BS == model.config.image_token_id).int(),
        image_grid_thw=grid_thw_I3,
        attention_mask=attention_mask_BS,
    )
    return positions_3BS


def forward(
    model: Any,
    token_ids_BS: Tensor,
    position_ids_3BS: Tensor,
    *,
    pixel_values_PD: Tensor | None = None,
    grid_thw_I3: Tensor | None = None,
    attention_mask_BK: Tensor | None = None,
    cache: Cache | None = None,
    num_logits: int = 1,
) -> Tensor:
    """Logits of the last `num_logits` places of each sequence, by one call of the model."""
    return model(
        input_ids=token_ids_BS,
        attention_mask=attention_mask_BK,
        position_ids=position_ids_3BS,
        pixel_values=pixel_values_PD,
        image_grid_thw=grid_thw_I3,
        past_key_values=cache,
        use_cache=cache is not None,
        logits_to_keep=num_logits,
    ).logits


def max_positions(config: Any) -> int:
    """The largest number of tokens of a sequence."""
    return config.text_config.max_position_embeddings


def usual_parts(model: Any) -> dict[str, Observation]:
    """The parts that can be observed in a model whose tower and language model are made of one list of layers each.

    What a layer of the language model gives is seen where the next one gets it: something may be added in between.
    """
    language, vision = model.model.language_model, model.model.visual
    parts = {
        TOKEN_IDS: Observation(language.embed_tokens, lambda args, _, __: args[0][0]),
        POSITION_IDS: Observation(language.rotary_emb, lambda args, _, __: args[1][-3:, 0].T),
        ANGLES: Observation(language.rotary_emb, _half_angles),
        PIXELS: Observation(vision, lambda args, _, __: args[0]),
        FEATURES: Observation(vision, lambda _, __, output: output.pooler_output),
    }
    layers = {f"{VISION_LAYER} {n}": Observation(layer, _whole) for n, layer in enumerate(vision.blocks)}
    followers = [*language.layers[1:], language.norm]
    layers |= {
        f"{LANGUAGE_LAYER} {n}": Observation(each, lambda args, _, __: args[0][0], before=True)
        for n, each in enumerate(followers)
    }
    return parts | layers


def _half_angles(_: tuple, __: dict[str, Any], output: tuple[Tensor, Tensor]) -> Tensor:
    """The first halves of the cosines and of the sines, which the second halves repeat."""
    return torch.cat([part_1TD[0].chunk(2, -1)[0] for part_1TD in output], dim=-1)


def _whole(_: tuple, __: dict[str, Any], output_PH: Tensor) -> Tensor:
    return output_PH
