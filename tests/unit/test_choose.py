"""Rounds of dynamic sampling: which groups are kept, when a step has enough, what it reports of all it generated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from megatron_papo.config import TrainConfig
from megatron_papo.training.dynamic_sampling import ChosenGroups
from megatron_papo.training.length_percentiles import split_lengths
from megatron_papo.types import Group, ModelInputs, Prompt, Rollout

MIXED, WRONG, RIGHT = (1.0, 0.0), (0.0, 0.0), (1.0, 1.0)


@pytest.fixture(scope="module")
def alone() -> Iterator[dist.ProcessGroup]:
    """The group of one rank; more of them are in tests/parallel."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def _group(place: int, accuracy: tuple[float, ...]) -> Group:
    prompt = Prompt(f"row-{place}", place, "how many?", "3", (), ModelInputs(torch.tensor([1, 2, 3]), None, None))
    rollouts = tuple(Rollout(index, (5,) * (index + 1), (-1.0,), "", "stop", 0) for index in range(len(accuracy)))
    return Group(prompt, rollouts, tuple(0.9 * value for value in accuracy), {"accuracy": accuracy})


def _chosen(group: dist.ProcessGroup, *rounds: Sequence[tuple[float, ...]], **dynamic) -> ChosenGroups:
    sampling = {"enabled": True, "prompts_per_round": 3, **dynamic}
    train = TrainConfig(prompts_per_step=4, updates_per_step=2, group_size=2, dynamic_sampling=sampling)
    chosen, place = ChosenGroups(train, merge_unit=4), 0
    for accuracies in rounds:
        groups = [_group(place + index, accuracy) for index, accuracy in enumerate(accuracies)]
        chosen = chosen.add(range(place, place + len(groups)), groups, group)
        place += len(groups)
    return chosen


def _means(chosen: ChosenGroups) -> dict[str, float]:
    return {name: total / count for name, (total, count) in chosen.metrics.items()}


def test_rounds_go_on_until_the_batch_is_full_and_the_rest_is_dropped(alone):
    rounds = [[WRONG, MIXED, RIGHT], [MIXED, MIXED, WRONG], [MIXED, MIXED, MIXED]]
    assert not _chosen(alone, *rounds[:2]).enough
    chosen = _chosen(alone, *rounds)
    assert chosen.enough
    assert [[group.prompt.row for group in update] for update in chosen.by_update()] == [[1, 3], [4, 6]]
    means = _means(chosen)
    assert (means["sampling/rounds"], means["sampling/prompts"], means["sampling/left_over"]) == (3, 9, 2)
    assert means["sampling/kept_share"] == pytest.approx(6 / 9)


def test_what_is_reported_is_of_all_that_was_generated(alone):
    means = _means(_chosen(alone, [WRONG, WRONG, MIXED], [WRONG, MIXED, MIXED], [MIXED, WRONG, RIGHT]))
    assert means["reward/accuracy"] == pytest.approx(6 / 18), "0.5 of those kept"
    assert means["reward"] == pytest.approx(0.9 * 6 / 18)
    assert (means["group/all_equal"], means["response_tokens"], means["prompt_tokens"]) == (5 / 9, 1.5, 3)


def test_percentiles_of_lengths_are_of_all_ranks_and_rounds(alone):
    """By hand: `_group` has prompts of three tokens, and responses of one and of two."""
    rest, found = split_lengths(_chosen(alone, [WRONG, MIXED, MIXED], [MIXED, MIXED, WRONG]).metrics)
    assert not [name for name in rest if "lengths" in name] and "response_tokens" in rest
    assert found == {f"prompt_tokens_{name}": 3 for name in ("p50", "p90", "p99", "max")} | {
        "response_tokens_p50": 1, "response_tokens_p90": 2, "response_tokens_p99": 2, "response_tokens_max": 2,
    }  # fmt: skip
    ten = {f"trained/lengths/response_tokens/{tokens}": (1.0, 1.0) for tokens in (7, 100, *range(10, 18))}
    shares = {name.removeprefix("trained/response_tokens_"): value for name, value in split_lengths(ten)[1].items()}
    assert shares == {"p50": 13, "p90": 17, "p99": 100, "max": 100}


def test_without_dynamic_sampling_all_are_trained_on_and_nothing_is_reported_twice(alone):
    chosen = _chosen(alone, [WRONG, RIGHT, MIXED, MIXED], enabled=False)
    assert chosen.enough and [len(update) for update in chosen.by_update()] == [2, 2]
    assert chosen.metrics == {"sampling/rounds": (1.0, 1.0), "sampling/kept_share": (4.0, 4.0)}


def test_a_round_that_keeps_nothing_is_dropped_or_kept_whole(alone):
    rounds = [[MIXED, MIXED, WRONG], [WRONG, RIGHT, RIGHT]]
    dropped, kept = (_chosen(alone, *rounds, when_none_kept=way) for way in ("drop", "keep"))
    assert not dropped.enough and _means(dropped)["sampling/whole_rounds"] == 0
    assert kept.enough and _means(kept)["sampling/whole_rounds"] == 1
    assert [[group.prompt.row for group in update] for update in kept.by_update()] == [[0, 1], [3, 4]]
    one_kept = _chosen(alone, [MIXED, WRONG, WRONG], when_none_kept="keep")
    assert one_kept.kept == (0,), "a round of which one is kept is no fallback"


def test_a_step_gives_up_when_its_rounds_are_used_up(alone):
    hopeless = [[MIXED, WRONG, WRONG], [WRONG, WRONG, WRONG]]
    with pytest.raises(ValueError) as caught:
        _chosen(alone, *hopeless, max_rounds=2)
    assert str(caught.value) == (
        "train.dynamic_sampling: after 2 rounds, 6 prompts in all, only 1 of 4 prompts had a mean accuracy between "
        "0.01 and 0.99: the data is too easy or too hard for this policy"
    )
    assert _chosen(alone, *hopeless, max_rounds=2, when_none_kept="keep").enough


def _with_a_failure(chosen: list[tuple[float, ...]], failed: int) -> list[Group]:
    groups = [_group(place, accuracy) for place, accuracy in enumerate(chosen)]
    return [
        replace(group, reward_parts=group.reward_parts | {"failed": (0.0, float(place < failed))})
        for place, group in enumerate(groups)
    ]


@pytest.mark.parametrize("failed, updates", [(0, [[0, 1], [2, 3]]), (1, [[1], [2, 3]]), (3, [[3]])])
def test_groups_with_a_failed_reward_are_left_out_and_the_rest_is_cut_anew(alone, failed, updates):
    train = TrainConfig(prompts_per_step=4, updates_per_step=2, group_size=2)
    chosen = ChosenGroups(train, merge_unit=4, drop_failed=True)
    chosen = chosen.add(range(4), _with_a_failure([MIXED, RIGHT, WRONG, MIXED], failed), alone)
    assert chosen.enough and [[group.prompt.row for group in update] for update in chosen.by_update()] == updates
    means = _means(chosen)
    assert (means["sampling/kept_share"], means["reward/failed"]) == ((4 - failed) / 4, failed / 8)
    zero = ChosenGroups(train, merge_unit=4).add(range(4), _with_a_failure([MIXED] * 4, failed), alone)
    assert len(zero.kept) == 4


def test_a_step_of_which_every_group_failed_ends_the_run(alone):
    chosen = ChosenGroups(TrainConfig(prompts_per_step=3, group_size=2), merge_unit=4, drop_failed=True)
    with pytest.raises(ValueError, match=r"^reward.on_failure=drop_group: .* every prompt of the step"):
        chosen.add(range(3), _with_a_failure([MIXED] * 3, 3), alone)


def test_dynamic_sampling_draws_others_in_place_of_failed_groups(alone):
    sampling = {"enabled": True, "prompts_per_round": 3, "when_none_kept": "keep"}
    train = TrainConfig(prompts_per_step=2, updates_per_step=2, group_size=2, dynamic_sampling=sampling)
    chosen = ChosenGroups(train, merge_unit=4, drop_failed=True)
    chosen = chosen.add(range(3), _with_a_failure([MIXED, MIXED, WRONG], 1), alone)
    assert not chosen.enough and chosen.kept == (1,)
    failed_or_equal = ChosenGroups(train, merge_unit=4, drop_failed=True)
    failed_or_equal = failed_or_equal.add(range(3), _with_a_failure([MIXED, RIGHT, WRONG], 1), alone)
    assert failed_or_equal.kept == (1, 2), "a round that is kept whole is kept without those that failed"
