"""Scores and updates through the pipeline: what is asked of which rank, and what the metrics of an update are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_papo.config import Config
from tests.support.ranks import run_ranks
from tests.support.tiny_run import tiny_run

RESPONSES = (((70, 71, 72), (73,)), ((80, 81), (82, 83, 84, 85)), ((90,), (91, 92)), ((65, 66, 67), (68, 69)))
"""Of the rollouts of each prompt."""


ROWS = {"train__tokens_per_micro_batch": 60}
"""Several rows, one with text alone."""


def _advantages(place: int) -> tuple[float, float]:
    return 1.0 + place, -0.5


def _rows(run, places=(0, 1, 2, 3)):
    """The prompts at `places` with their rollouts, in several rows; every prompt with an image has a masked view."""
    from megatron_papo.data.dataset import PromptDataset
    from megatron_papo.distributed.exchange import gather_objects
    from megatron_papo.packing import sum_totals, token_totals
    from megatron_papo.training.batching import pack_rows
    from megatron_papo.types import Group, Rollout

    dataset = PromptDataset(run.config.data, "train", run.processor)
    groups = []
    for place in places:
        prompt = dataset.prompt(place)
        if prompt.inputs.pixel_values_PD is not None:
            prompt = replace(prompt, masked_pixel_values_PD=prompt.inputs.pixel_values_PD * 0.3)
        rollouts = [
            Rollout(index, ids, (-1.0,) * len(ids), "", "stop", 0) for index, ids in enumerate(RESPONSES[place])
        ]
        groups.append(Group(prompt, tuple(rollouts), advantages=_advantages(place)))
    totals = sum_totals(gather_objects(token_totals(groups), run.layout.data_group))
    return pack_rows(run, groups, totals, run.config.loss)


def _score(config: Config) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Log-probs and entropies of every row, on a rank that has pixels only if it is of the first stage."""
    from megatron_papo.model.policy import HeadRequest
    from megatron_papo.optimization.pipeline import score
    from megatron_papo.training.session import open_run

    with open_run(config) as run:
        rows = _rows(run)
        assert sum(bool(row.pixel_values) for row in rows) > 1
        if not run.layout.is_first_stage:  # a meta tensor has no values: reading or moving it raises
            rows = [replace(row, pixel_values=tuple(view.to("meta") for view in row.pixel_values)) for row in rows]
        with _no_pickled_exchange():
            outputs = score(run.policy, rows, HeadRequest(full_entropy=True, banned_ids=run.banned_ids))
        with pytest.raises(ValueError, match="are in a response, but are banned"):  # on every stage alike
            score(run.policy, rows, HeadRequest(banned_ids=(int(rows[-1].target_ids_R[0]),)))
        return [(output.policy_logprobs_R, output.entropy_R) for output in outputs]


@contextmanager
def _no_pickled_exchange() -> Iterator[None]:
    """One a row would be a round trip and a copy to the host each; every stage knows the shapes."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("an object was broadcast")

    original, dist.broadcast_object_list = dist.broadcast_object_list, refuse
    try:
        yield
    finally:
        dist.broadcast_object_list = original


def test_the_last_stage_scores_without_pixels_and_the_others_hear_it(inputs, tmp_path):
    (expected,) = run_ranks(_score, 1, tiny_run(inputs, tmp_path / "one", **ROWS))
    found = run_ranks(_score, 2, tiny_run(inputs, tmp_path / "two", parallel__pipeline=2, **ROWS))
    assert len(expected) > 1
    for rank in found:
        torch.testing.assert_close(rank, expected, atol=1e-4, rtol=0)


def _score_for_the_loss(config: Config) -> dict[str, Any]:
    """What `score_logprobs` asked the head for over two updates, and what it found with a policy away from its
    reference."""
    from megatron_papo.model.policy import HeadRequest
    from megatron_papo.optimization.pipeline import score_logprobs
    from megatron_papo.optimization.reference import ReferencePolicy
    from megatron_papo.training.session import open_run

    with open_run(config) as run:
        module, batches, asked = run.policy, [_rows(run, (0, 1)), _rows(run, (2, 3))], []
        reference = ReferencePolicy(module)
        head = HeadRequest(full_entropy=True, full_kl=True, banned_ids=run.banned_ids)
        same = score_logprobs(run.policy, batches, config, head, reference, reference_is_policy=True)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(1.1)
        own = [parameter.detach().clone() for parameter in module.parameters()]
        module.register_forward_pre_hook(lambda _, args: asked.append(args[1]))
        scored = score_logprobs(run.policy, batches, config, head, reference)
        kept = all(torch.equal(now, before) for now, before in zip(module.parameters(), own, strict=True))
        passes = len(asked)
        untouched = score_logprobs(run.policy, batches, config, head, reference, reference_is_policy=True)
        return {
            "asked": asked[:passes], "asked of an untouched policy": len(asked) - passes, "weights kept": kept,
            "scored": [row for batch in scored for row in batch], "rows": [len(batch) for batch in scored],
            "image rows": sum(bool(row.pixel_values) for batch in scored for row in batch),
            "same": [row for batch in same for row in batch],
            "untouched": [row for batch in untouched for row in batch],
        }  # fmt: skip


def test_scoring_for_the_loss_makes_log_probs_alone_and_none_that_are_known(inputs, tmp_path):
    settings = {"loss__reference_coef": 0.1, "loss__perception_coef": 0.1, "perception__masked_branch": "frozen"}
    (found,) = run_ranks(_score_for_the_loss, 1, tiny_run(inputs, tmp_path, **settings, **ROWS, entropy__kind="full"))
    first, second = found["rows"]
    assert first > 1 and second > 1 and found["image rows"] < first + second
    # old: the second update's rows; masked: those with an image; reference: all
    assert len(found["asked"]) == second + found["image rows"] + first + second
    assert found["asked of an untouched policy"] == first + second + found["image rows"]
    assert not any(head.full_entropy or head.full_kl for head in found["asked"])
    assert found["weights kept"]
    for place, row in enumerate(found["scored"]):
        assert (row.old_logprobs_R is None) == (place < first)
        assert (row.masked_logprobs_R is None) == (not row.pixel_values)
        policy_R = found["untouched"][place].ref_logprobs_R  # of the policy as it is now, by another pass
        if place >= first:
            torch.testing.assert_close(row.old_logprobs_R, policy_R, atol=1e-6, rtol=0)
            assert (row.old_logprobs_R - row.ref_logprobs_R).abs().max() > 0.01
        if row.pixel_values:
            changed_R = (row.masked_logprobs_R - policy_R).abs()
            assert changed_R[row.has_image_R].max() > 0.01
            assert (changed_R[~row.has_image_R] < 1e-5).all()
        # the reference's own pass says what it said when it still was the policy
        torch.testing.assert_close(row.ref_logprobs_R, found["same"][place].ref_logprobs_R, atol=1e-6, rtol=0)


def _update(config: Config) -> tuple[dict[str, tuple[float, float]], int]:
    """Metrics of one optimizer step over prompts 0 to 3, two for each of two data-parallel ranks; rows of this rank."""
    from functools import partial

    from megatron_papo.algorithm.loss_settings import LossSettings
    from megatron_papo.algorithm.losses import papo_loss
    from megatron_papo.model.policy import HeadRequest
    from megatron_papo.optimization.optimizer import build_optimizer, wrap_policy
    from megatron_papo.optimization.pipeline import update_policy
    from megatron_papo.training.session import open_run

    with open_run(config) as run:
        rows = _rows(run, (0, 1, 2, 3)[run.layout.data_rank :: run.layout.data_size])
        loss = partial(papo_loss, settings=LossSettings.at_step(config, 0))
        optimizer = build_optimizer(wrap_policy(run.policy, config), config, 1)
        head = HeadRequest(banned_ids=run.banned_ids)
        return update_policy(optimizer, rows, head, loss), len(rows)


@pytest.mark.parametrize("averaging", ["token", "sequence", "fixed"])
def test_the_loss_of_an_update_is_its_value_and_counts_once(averaging, inputs, tmp_path):
    settings = {"loss__averaging": averaging, "loss__perception_coef": 0.0, "loss__reference_coef": 0.0}
    if averaging == "fixed":
        settings["loss__fixed_denominator"] = 50.0
    lengths = torch.tensor([[len(ids) for ids in group] for group in RESPONSES])
    weights = {"token": lengths / lengths.sum(), "sequence": torch.full((4, 2), 1 / 8), "fixed": lengths / 50.0}
    # on-policy and without other terms: minus the weighted sum of advantages
    expected = -(weights[averaging] * torch.tensor([_advantages(place) for place in range(4)])).sum().item()
    assert abs(expected) > 0.2
    for world_size, layout in ((1, {}), (2, {}), (2, {"parallel__pipeline": 2})):
        config = tiny_run(inputs, tmp_path / f"{world_size}{len(layout)}", **settings, **layout, **ROWS)
        results = run_ranks(_update, world_size, config)
        assert results[0][1] > 1
        for found, _ in results:
            assert found["loss/total"] == found["loss/policy"] == (pytest.approx(expected, abs=1e-6), 1)
            assert found["policy_logprobs"][1] == lengths.sum()
