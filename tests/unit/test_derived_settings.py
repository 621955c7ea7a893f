"""What several settings say together: the model's folders, and what an engine keeps its weights in."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_papo.config import ConfigError, load_config
from megatron_papo.config.derived import (
    engine_dtype,
    engine_weight_bytes,
    model_folder,
    model_folder_or_none,
    weights_folder,
)
from megatron_papo.generation.vllm.family_module import vllm_module
from megatron_papo.model.family import Family, family_named


def test_the_model_lies_in_its_folder_and_its_weights_in_the_checkpoint():
    both = load_config(None, ["model.path=hf", "model.checkpoint=saved"])
    assert (model_folder(both), weights_folder(both)) == (Path("hf"), Path("saved"))
    one = load_config(None, ["model.checkpoint=saved"])
    assert model_folder(one) == weights_folder(one) == Path("saved")
    none = load_config(None, [])
    assert model_folder_or_none(none) is None
    with pytest.raises(ConfigError, match=r"^model\.path: names no folder$"):
        weights_folder(none)


@pytest.mark.parametrize(
    ("settings", "dtype", "num_bytes"),
    [
        ([], "auto", 2),
        (["model.dtype=float32"], "float32", 4),
        (["model.dtype=float32", "generation.dtype=bfloat16"], "bfloat16", 2),
        (["generation.dtype=float32"], "float32", 4),
        (["generation.engine=vllm", "generation.quantization=fp8", "model.dtype=float32"], "float32", 1),
    ],
)
def test_the_engine_has_the_trainers_dtype_unless_it_has_its_own(settings, dtype, num_bytes):
    config = load_config(None, settings)
    assert (engine_dtype(config), engine_weight_bytes(config)) == (dtype, num_bytes)


def test_a_family_that_vllm_is_not_known_to_have_is_one_line():
    assert vllm_module(family_named("qwen2_5_vl")).CACHED_METHODS
    with pytest.raises(ValueError, match=r"nothing is known of vLLM's implementation of other"):
        vllm_module(Family("other", "tests.unit"))
