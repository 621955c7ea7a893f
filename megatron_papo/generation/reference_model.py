"""A model as transformers' classes of its family make it, from a folder that is not trusted.

No code of the folder is run, no attention kernel that it names is fetched, and the hub is never asked. Which classes
these are is the family's to say (`model/<family>/transformers_classes.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from megatron_papo.model.family import Family, family_named

Shapes = Mapping[str, tuple[int, ...]]
"""Name of a parameter in transformers' model -> its shape."""


def classes_of(family: Family) -> Any:
    """The family's module `transformers_classes`."""
    return family.module("transformers_classes")


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


def classes_of_model(model: PreTrainedModel) -> Any:
    """The module `transformers_classes` of the family that a model is of."""
    return classes_of(family_named(model.config.model_type))


def _model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    return classes_of(family_named(config.model_type)).MODEL_CLASS
