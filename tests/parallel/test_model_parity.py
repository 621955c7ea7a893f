"""The model under every layout says what transformers says of the same weights: log-probs and gradients.

Each layout runs as training runs it: data-parallel wrapper, Megatron's schedule, one packed row a micro-batch. The
gradients come back under transformers' names through the hand-over that writes weights.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_papo.model.shape import ModelShape
from tests.parallel.model_cases import CASES, SECOND_CASES, TOY_CASES, Reference, write_case
from tests.support.layouts import layout
from tests.support.ranks import run_ranks

TOLERANCE = 1e-4

Run = tuple[Path, float, list[int] | None]
"""A case as ranks run it: its folder, its temperature, and the layers of each pipeline stage where they are given."""

LAYOUTS = (
    "single",
    "single, selective recompute",
    "single, mlp recompute",
    "single, full recompute",
    "TP2",
    "TP2 SP",
    "TP2 SP, selective recompute",
    "TP2 SP, mlp recompute",
    "PP2, one layer first",
    "PP2, one layer last",
    "PP3, full recompute",
    "DP2",
    "TP4 SP",
    "TP2 PP2",
    "TP2 PP2 SP, full recompute",
)


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> list[tuple[Path, float, Reference]]:
    every = CASES + SECOND_CASES + TOY_CASES
    folders = [tmp_path_factory.mktemp("case") for _ in every]
    return [(folder, case.temperature, write_case(case, folder)) for case, folder in zip(every, folders)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_logprobs_and_gradients_equal_those_of_transformers(name, cases):
    ranks = layout(name)
    runs = [(folder, temperature, _stage_layers(name, folder)) for folder, temperature, _ in cases]
    results = run_ranks(score_and_differentiate, ranks.num_ranks, runs, ranks.overrides)
    for number, (_, _, reference) in enumerate(cases):
        found: dict[int, torch.Tensor] = {}
        for rank in results:
            found |= rank[number]["logprobs"]
        for row, expected in enumerate(reference.logprobs):
            torch.testing.assert_close(found[row], expected, atol=TOLERANCE, rtol=0)
        for rank in results:
            gradients = rank[number]["gradients"]
            assert gradients.keys() == reference.gradients.keys()
            for parameter, expected in reference.gradients.items():
                torch.testing.assert_close(
                    gradients[parameter], expected, atol=TOLERANCE, rtol=0, msg=lambda m, p=parameter: f"{p}: {m}"
                )


def _stage_layers(name: str, folder: Path) -> list[int] | None:
    """Of the layouts that name them."""
    rest = ModelShape.from_folder(folder).language.num_layers - 1
    return {"PP2, one layer first": [1, rest], "PP2, one layer last": [rest, 1]}.get(name)


@pytest.mark.parametrize("name", ["single", "TP2 SP"])
def test_computed_again_gradients_are_the_same_bits(name, cases):
    """Of both stacks of both families; rows of the second layout have padding.

    A layer of the tower that makes a level of DeepStack has three gradients to add up. Where whole layers are computed
    again, those within the next layer are added first: of that family these are equal but for this rounding.
    """
    ranks = layout(name)
    runs = [cases[number][:2] for number in (0, len(CASES))]
    for first, second in run_ranks(_gradients_of_each, ranks.num_ranks, runs, ranks.overrides):
        for gradients, modes in ((first, ("selective", "mlp", "full")), (second, ("selective", "mlp"))):
            for mode in modes:
                for name, kept in gradients["none"].items():
                    assert torch.equal(gradients[mode][name], kept), (mode, name)
        for name, kept in second["none"].items():
            torch.testing.assert_close(second["full"][name], kept, atol=1e-6, rtol=1e-5)


def _gradients_of_each(
    runs: list[tuple[Path, float]], overrides: tuple[str, ...]
) -> list[dict[str, dict[str, torch.Tensor]]]:
    from megatron_papo.config import load_config
    from megatron_papo.distributed.accelerator import adapt_megatron
    from megatron_papo.distributed.layout import initialize

    adapt_megatron()
    configs = {
        mode: load_config(None, ("model.dtype=float32", f"model.recompute={mode}", *overrides))
        for mode in ("none", "selective", "mlp", "full")
    }
    initialize(configs["none"].parallel)
    return [
        {mode: _run(config, folder, temperature)["gradients"] for mode, config in configs.items()}
        for folder, temperature in runs
    ]


def score_and_differentiate(runs: list[Run], overrides: tuple[str, ...]) -> list[dict]:
    """On a rank: for every case, log-probs by row (where this rank has them) and the whole model's gradients."""
    from megatron_papo.config import load_config
    from megatron_papo.distributed.accelerator import adapt_megatron
    from megatron_papo.distributed.layout import initialize

    adapt_megatron()
    config = load_config(None, ("model.dtype=float32", *overrides))
    initialize(config.parallel)
    found = []
    for folder, temperature, layers in runs:
        parallel = config.parallel.model_copy(update={"pipeline_layers": layers})
        found.append(_run(config.model_copy(update={"parallel": parallel}), folder, temperature))
    return found


def _run(config, folder: Path, temperature: float) -> dict:
    from megatron_papo.model.policy import HeadRequest, build_policy
    from megatron_papo.optimization.optimizer import wrap_policy
    from megatron_papo.weights.transfer import hf_tensors, read_hf

    shape = ModelShape.from_folder(folder)
    model = build_policy(config, shape)
    read_hf(model, shape, folder)
    policy = wrap_policy(model, config)
    logprobs = run_rows(policy, folder, HeadRequest(temperature))
    for parameter in model.parameters():
        parameter.data.copy_(parameter.main_grad)
    gradients = {name: tensor.clone() for name, tensor in hf_tensors(model, shape, module_names=True)}
    return {"logprobs": logprobs, "gradients": gradients}


def run_rows(policy, folder: Path, head) -> dict[int, torch.Tensor]:
    """Forward and backward over this data-parallel rank's rows; log-probs by row on the last stage."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_papo.distributed.layout import layout

    here, logprobs = layout(), {}
    rows = list(enumerate(torch.load(folder / "rows.pt", weights_only=False)))[here.data_rank :: here.data_size]

    def forward_step(iterator, model):
        number, row = next(iterator)

        def loss(outputs):
            logprobs[number] = outputs.policy_logprobs_R.detach()
            return (outputs.policy_logprobs_R * row.weights_R).sum(), torch.zeros((), dtype=torch.int), {}

        return model(row, head), loss

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(rows),
        model=[policy],
        num_microbatches=len(rows),
        seq_length=1,
        micro_batch_size=1,
        forward_only=False,
    )
    return logprobs
