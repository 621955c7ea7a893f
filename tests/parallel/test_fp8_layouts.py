"""Emulated FP8 under every layout, against one rank: log-probs and gradients of a packed row, for each family.

- Pipeline and data parallelism cut nothing that shares a scale: equal to one rank as without FP8.
- mxfp8 and delayed under tensor parallelism: blocks of 32 end where a rank's share ends, and delayed scales are of the
  maxima over the tensor ranks, so the scales are one rank's. But what is summed over ranks differs in its last bit, and
  a bit can turn a value to the next 8-bit float, one of the hundreds that an output sums: a quarter of what FP8 does.
- tensorwise: a rank's share of a weight, of the width of the input of proj and fc2, and of a column-parallel gradient
  has a maximum of its own, and so a scale of its own, as in Transformer Engine. Tiles of blockwise, 128 x 128, are
  larger than the shares here. The rounding is then another one, as far from no rounding as one rank's: that is what is
  asked of it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.parallel.model_cases import Case, write_case
from tests.parallel.test_model_parity import run_rows
from tests.support.layouts import layout
from tests.support.ranks import run_ranks

ROWS = ((((6, 10),), ((4, 4),)), (((4, 2),), ()))
CASES = (
    Case("four layers", ROWS, {"layers": 4}),
    Case("three levels of DeepStack", ROWS, {"layers": 4, "vision_depth": 3}, family="qwen3_vl"),
)
RECIPES = ("tensorwise", "delayed", "blockwise", "mxfp8")
MODELS = [
    pytest.param(case, recipe, marks=pytest.mark.slow if case is CASES[1] and recipe != "mxfp8" else ())
    for case in CASES
    for recipe in RECIPES
]
TP = ("TP2", "TP2 SP")

of_models = pytest.mark.parametrize(
    ("folder", "single"), MODELS, indirect=True, scope="module", ids=lambda value: getattr(value, "family", value)
)


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("case")
    write_case(request.param, folder)
    return folder


def _settings(recipe: str) -> tuple[str, ...]:
    return (f"fp8.recipe={recipe}", "fp8.first_layers=0", "fp8.last_layers=0", "fp8.vision=true")


def _found(folder: Path, world_size: int, overrides: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of both rows, and all gradients as one vector."""
    ranks = run_ranks(_run, world_size, folder, overrides)
    logprobs: dict[int, torch.Tensor] = {}
    for rank in ranks:
        logprobs |= rank["logprobs"]
    gradients = ranks[0]["gradients"]
    return torch.cat([logprobs[row] for row in sorted(logprobs)]), torch.cat(
        [gradients[name].flatten() for name in sorted(gradients)]
    )


def _run(folder: Path, overrides: tuple[str, ...]) -> dict:
    from megatron_papo.config import load_config
    from megatron_papo.distributed.accelerator import adapt_megatron
    from megatron_papo.distributed.layout import initialize
    from megatron_papo.model.policy import HeadRequest, build_policy
    from megatron_papo.model.shape import ModelShape
    from megatron_papo.optimization.optimizer import wrap_policy
    from megatron_papo.weights.transfer import hf_tensors, read_hf

    adapt_megatron()
    config = load_config(None, ("model.dtype=float32", *overrides))
    initialize(config.parallel)
    shape = ModelShape.from_folder(folder)
    model = build_policy(config, shape)
    read_hf(model, shape, folder)
    with model.fp8.updating():
        logprobs = run_rows(wrap_policy(model, config), folder, HeadRequest())
    for parameter in model.parameters():
        parameter.data.copy_(parameter.main_grad)
    gradients = {name: tensor.clone() for name, tensor in hf_tensors(model, shape, module_names=True)}
    return {"logprobs": logprobs, "gradients": gradients}


@pytest.fixture(scope="module")
def plain(folder):
    return _found(folder, 1, ())


@pytest.fixture(scope="module")
def single(request, folder):
    return request.param, *_found(folder, 1, _settings(request.param))


def _off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@of_models
@pytest.mark.parametrize("name", ["PP2", "DP2"])
def test_stages_and_data_parallel_ranks_change_nothing(name, single, folder):
    recipe, logprobs, gradients = single
    if recipe == "delayed" and name == "DP2":
        pytest.skip("each data-parallel rank looks back on its own rows")
    found, found_gradients = _found(folder, 2, (*_settings(recipe), *layout(name).overrides))
    torch.testing.assert_close(found, logprobs, atol=1e-5, rtol=0)
    assert _off(found_gradients, gradients) < 1e-5


@of_models
@pytest.mark.parametrize("name", TP)
def test_tensor_parallelism_rounds_as_well_as_one_rank(name, single, plain, folder):
    recipe, logprobs, gradients = single
    found, found_gradients = _found(folder, 2, (*_settings(recipe), *layout(name).overrides))
    print(recipe, name, *(f"{_off(*pair):.2e}" for pair in (
        (found, logprobs), (found, plain[0]), (logprobs, plain[0]),
        (found_gradients, gradients), (found_gradients, plain[1]), (gradients, plain[1]),
    )))  # fmt: skip
    for got, want, exact in ((found, logprobs, plain[0]), (found_gradients, gradients, plain[1])):
        own, others = _off(got, exact), _off(want, exact)
        assert others > 1e-3  # FP8 it was
        assert own < 1.5 * others
        if recipe in ("mxfp8", "delayed"):
            assert _off(got, want) < others / 4
