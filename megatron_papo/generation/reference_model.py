"""A model as transformers' classes of its family make it, from a folder that is not trusted.

No code of the folder is run, no attention kernel that it names is fetched, and the hub is never asked. The family says
which classes these are (`TransformersModule`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from megatron_papo.model.family import Family, family_named
from megatron_papo.model.observed import Observed

Shapes = Mapping[str, tuple[int, ...]]
"""Name of a parameter in transformers' model -> its shape."""


class TransformersModule(Protocol):
    """A family's `transformers_classes.py`: its model in transformers, and how that is called.

    It is the reference for the trainer, and the transformers engine decodes with it. Importing it imports
    transformers' own files of the family, which takes longer than a small run's first step.
    """

    CONFIG_CLASS: type[PreTrainedConfig]
    """Settings, whose `model_type` is the family's."""
    MODEL_CLASS: type[PreTrainedModel]
    """The model. It keeps keys and values in a transformers `Cache` and runs with `attn_implementation="sdpa"`. Weights
    are handed over to every engine under the names of its parameters."""

    def max_positions(self, config: Any) -> int:
        """Tokens of the longest sequence that the model is made for."""

    def position_ids(
        self,
        model: Any,
        token_ids_BS: Tensor,
        grid_thw_I3: Tensor | None,
        attention_mask_BS: Tensor | None = None,
    ) -> Tensor:
        """Positions [3, B, S] (time, height, width) of whole prompts, as transformers computes them.

        `grid_thw_I3` has the images of all rows in order. `attention_mask_BS` is 0 where a row is padded; None where no
        row is. A response goes on from the largest position of its prompt plus one, alike in all three.
        """

    def forward(
        self,
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
        """Logits [B, num_logits, V] of the last `num_logits` tokens of every row.

        `cache`: keys and values of the tokens before these, to which those of these tokens are added; None for
        sequences that are read whole. `attention_mask_BK`: over the K tokens in the cache and these, 0 for padding;
        None where no row is padded. Images are given with the prompt only.
        """

    def observed(self, model: Any) -> Observed:
        """Every part but the log-probs, while the model runs on one sequence (B = 1)."""


def classes_of(family: Family) -> TransformersModule:
    """The family's module `transformers_classes`."""
    return cast("TransformersModule", family.module("transformers_classes"))


def read_config(folder: Path, family: Family) -> PreTrainedConfig:
    """transformers' settings of the folder. Raises ValueError, in one line that names the file."""
    try:
        config = classes_of(family).CONFIG_CLASS.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        config._attn_implementation = "sdpa"  # in all parts: the name of a repository would be fetched and run
        return config
    except Exception as error:  # of any type, depending on the key that transformers stumbles over
        reason = str(error).strip().splitlines() or [""]
        raise ValueError(f"{folder}/config.json: {type(error).__name__}: {reason[0]}") from error


def expected_shapes(config: PreTrainedConfig) -> Shapes:
    """The parameters of the model with these settings. A tied head is left out: the embedding is the head."""
    with torch.device("meta"):
        model = _model_class(config)(config)
    return shapes_of(model)


def shapes_of(model: PreTrainedModel) -> Shapes:
    """The parameters of a model; a tied head is left out."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def empty_model(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model with undefined weights, ready to be written and evaluated.

    It is built in `dtype`: `.to(dtype)` would round the rotary frequencies too, which transformers keeps in fp32.
    """
    config.dtype = dtype
    with no_init_weights(), device:
        model = _model_class(config)._from_config(config, attn_implementation="sdpa")
    model.tie_weights()  # building without initial weights leaves a tied head untied
    return model.eval().requires_grad_(False)


def read_model(folder: Path, family: Family, dtype: torch.dtype) -> PreTrainedModel:
    """The model of the folder with its weights, as transformers reads them, in host memory."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    config = read_config(folder, family)
    model = _model_class(config).from_pretrained(
        folder, config=config, dtype=dtype, attn_implementation="sdpa",
        local_files_only=True, trust_remote_code=False, use_safetensors=True,
    )  # fmt: skip
    if shown:
        logging.enable_progress_bar()
    return model.eval().requires_grad_(False)


def classes_of_model(model: PreTrainedModel) -> TransformersModule:
    """The module `transformers_classes` of the family that a model is of."""
    return classes_of(family_named(model.config.model_type))


def _model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    return classes_of(family_named(config.model_type)).MODEL_CLASS
