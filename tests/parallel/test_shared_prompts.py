"""Rows in which rollouts share their prompt say what every rollout says alone: log-probs, entropies, KL, gradients.

The reference packs every rollout with its prompt as a row of its own, both views, on one rank. What is compared runs
as training runs it: groups balanced over the data-parallel ranks, packed under a budget that splits some of them,
Megatron's schedule, under every kind of layout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_papo.config import Config
from tests.support.layouts import layout
from tests.support.ranks import run_ranks
from tests.support.tiny_run import tiny_run

TOLERANCE = 1e-5
LENGTHS = ((4, 1, 9, 3), (2, 5, 5), (6, 2), (3, 3, 8), (1, 1, 1, 7, 2))
"""Of the responses to the first prompts: one image, one of odd size, none, several, a wide one."""
SETTINGS = {
    "loss__perception_coef": 0.3,
    "loss__reference_coef": 0.0,
    "loss__entropy_coef": 0.1,
    "loss__masked_entropy_coef": 0.1,
    "perception__masked_branch": "joint",
    "perception__kl": "full",
    "entropy__kind": "full",
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "single": {},
    "single, rows split": {"train__tokens_per_micro_batch": 100},
    "single, selective recompute": {},
    "TP2": {"train__tokens_per_micro_batch": 150},
    "TP2 SP, full recompute": {},
    "PP2": {},
    "DP2": {"train__tokens_per_micro_batch": 100},
    "DP3": {},
    "TP2 PP2 SP, selective recompute": {},
}
"""What else differs from the run on one rank."""
OF_BOTH = ("single, rows split", "PP2", "DP2", "TP2 PP2 SP, selective recompute")
"""The layouts in which the second family is run as well."""
RUNS = [
    *(("qwen2_5_vl", name) for name in LAYOUTS),
    *(("qwen3_vl", name) for name in OF_BOTH),
]


@pytest.fixture(scope="module")
def inputs(inputs_of) -> Callable[[str], Path]:
    """Of a family."""
    return lambda family: inputs_of(family=family, std=0.08)


@pytest.fixture(scope="module")
def alone(inputs, tmp_path_factory) -> Callable[[str], dict[str, Any]]:
    """Of a family: every rollout in a row of its own, run once."""

    @cache
    def of(family: str) -> dict[str, Any]:
        (found,) = run_ranks(_run, 1, _config(inputs(family), tmp_path_factory.mktemp("alone")), True)
        return found

    return of


def _config(inputs: Path, folder: Path, **settings: Any) -> Config:
    return tiny_run(inputs, folder, **{"train__tokens_per_micro_batch": 2000, **SETTINGS, **settings})


def _groups(run) -> list:
    from megatron_papo.data.dataset import PromptDataset
    from megatron_papo.types import Group, Rollout

    dataset, generator, groups = PromptDataset(run.config.data, "train", run.processor), torch.Generator(), []
    for row, lengths in enumerate(LENGTHS):
        prompt = dataset.prompt(row)
        if prompt.has_image:
            prompt = replace(prompt, masked_pixel_values_PD=prompt.inputs.pixel_values_PD * 0.3 + 0.1)
        generator.manual_seed(row)
        ids = [tuple(torch.randint(32, 120, (length,), generator=generator).tolist()) for length in lengths]
        rollouts = tuple(Rollout(index, own, (-1.0,) * len(own), "", "stop", 0) for index, own in enumerate(ids))
        groups.append(Group(prompt, rollouts, advantages=tuple(1.0 - index for index in range(len(ids)))))
    return groups


def _each(group) -> list:
    """The group's rollouts as groups of one."""
    pairs = zip(group.rollouts, group.advantages)
    return [replace(group, rollouts=(rollout,), advantages=(advantage,)) for rollout, advantage in pairs]


def _share(groups: list, layout) -> list:
    """Uneven on purpose: with several data-parallel ranks the first holds one group, the second the rest."""
    if layout.data_size == 1:
        return groups
    return {0: groups[:1], 1: groups[1:]}.get(layout.data_rank, [])


def _run(config: Config, each_alone: bool) -> dict[str, Any]:
    """Values of every rollout that this rank saw, and the gradients of the whole model."""
    from megatron_papo.algorithm.loss_settings import LossSettings
    from megatron_papo.algorithm.losses import papo_loss
    from megatron_papo.model.policy import HeadRequest
    from megatron_papo.optimization.optimizer import wrap_policy
    from megatron_papo.optimization.pipeline import run_schedule
    from megatron_papo.packing import joint_row, token_totals
    from megatron_papo.training.batching import pack_rows, pack_update
    from megatron_papo.training.session import open_run
    from megatron_papo.weights.transfer import hf_tensors

    with open_run(config) as run:
        groups = _groups(run)
        if each_alone:
            totals, single = token_totals(groups), [one for group in groups for one in _each(group)]
            rows = tuple(row for group in single for row in pack_rows(run, [group], totals, config.loss, joint=True))
        else:
            rows = pack_update(run, _share(groups, run.layout), groups[0], config.loss, joint=True)
        policy = wrap_policy(run.policy, config)
        loss = partial(papo_loss, settings=LossSettings.at_step(config, 0))
        seen: dict[tuple[str, int], dict[str, torch.Tensor]] = {}

        def micro_loss(outputs, row):
            for index, sequence in enumerate(row.sequences):
                its_R = row.rollout_index_R == index
                if row.weights_R[its_R].any():
                    seen[sequence] = {name: values[its_R].detach() for name, values in vars(outputs).items()}
            return loss(outputs, row)

        head = HeadRequest(full_entropy=True, full_kl=True, banned_ids=run.banned_ids)
        run_schedule(policy, tuple(map(joint_row, rows)), head, micro_loss)
        for parameter in run.policy.parameters():
            parameter.data.copy_(parameter.main_grad)
        gradients = {name: tensor.clone() for name, tensor in hf_tensors(run.policy, run.shape)}
        return {"seen": seen, "gradients": gradients, "tokens": [row.num_tokens for row in rows]}


@pytest.mark.parametrize(("family", "name"), RUNS)
def test_shared_prompts_change_nothing(family, name, inputs, alone, tmp_path):
    ranks, alone = layout(name, **LAYOUTS[name]), alone(family)
    results = run_ranks(_run, ranks.num_ranks, _config(inputs(family), tmp_path, **ranks.settings), False)
    seen: dict[tuple[str, int], dict[str, torch.Tensor]] = {}
    for rank in results:
        seen |= rank["seen"]
    assert seen.keys() == alone["seen"].keys() and len(seen) == sum(map(len, LENGTHS))
    for sequence, expected in alone["seen"].items():
        assert {"policy_logprobs_R", "entropy_R", "masked_entropy_R", "perception_kl_R"} <= expected.keys()
        torch.testing.assert_close(seen[sequence], expected, atol=TOLERANCE, rtol=TOLERANCE)
    for rank in results:
        torch.testing.assert_close(rank["gradients"], alone["gradients"], atol=TOLERANCE, rtol=TOLERANCE)
    assert max(gradient.abs().max() for gradient in alone["gradients"].values()) > 0.01
    assert max(values["perception_kl_R"].max() for values in seen.values()) > 0.01


def test_budgets_split_groups_and_ranks_share_the_work(inputs, alone, tmp_path):
    """What the cases above are to show did happen in them."""
    inputs, alone = inputs("qwen2_5_vl"), alone("qwen2_5_vl")
    (whole,) = run_ranks(_run, 1, _config(inputs, tmp_path / "whole"), False)
    (split,) = run_ranks(_run, 1, _config(inputs, tmp_path / "split", train__tokens_per_micro_batch=100), False)
    assert len(whole["tokens"]) == 1 and sum(whole["tokens"]) < 0.5 * sum(alone["tokens"])
    assert len(split["tokens"]) > len(LENGTHS) and sum(whole["tokens"]) < sum(split["tokens"]) < sum(alone["tokens"])
    ranks = run_ranks(_run, 3, _config(inputs, tmp_path / "ranks"), False)
    tokens = [sum(rank["tokens"]) for rank in ranks]
    assert sum(tokens) == sum(whole["tokens"]) and max(tokens) < 0.5 * sum(tokens)
