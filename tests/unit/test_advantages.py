"""Group advantages by hand, groups without signal, the choice of dynamic sampling."""

from __future__ import annotations

from math import inf, nan, sqrt

import pytest
import torch

from megatron_papo.algorithm.advantages import group_advantages, keep_group, with_advantages
from megatron_papo.config import DynamicSamplingConfig
from megatron_papo.training.rollout_metrics import rollout_sums
from megatron_papo.types import Group, ModelInputs, Prompt, Rollout

PROMPT = Prompt("row-7", 7, "how many?", "3", (), ModelInputs(torch.tensor([1, 2]), None, None))


def _group(rewards: tuple[float, ...], accuracy: tuple[float, ...] = (), num_rollouts: int | None = None) -> Group:
    count = len(rewards) if num_rollouts is None else num_rollouts
    rollouts = tuple(Rollout(index, (5,), (-1.0,), "", "stop", 0) for index in range(count))
    return Group(PROMPT, rollouts, rewards, {"accuracy": accuracy} if accuracy else {})


def test_advantages_by_hand():
    # mean 0.25, deviations .75 -.25 -.25 -.25, unbiased variance (.5625 + 3 x .0625) / 3 = .25, std 0.5
    found = with_advantages(_group((1.0, 0.0, 0.0, 0.0))).advantages
    assert found == pytest.approx((0.75 / 0.500001, -0.25 / 0.500001, -0.25 / 0.500001, -0.25 / 0.500001), rel=1e-15)
    # two rewards: std = |difference| / sqrt 2
    assert group_advantages((0.9, 1.0)) == pytest.approx((-sqrt(0.5), sqrt(0.5)), rel=1e-4)


@pytest.mark.parametrize("reward", [0.9, 0.1, 0.9 * 1 + 0.1 * 1, 1e30])
def test_equal_rewards_give_exactly_zero(reward: float):
    assert with_advantages(_group((reward,) * 5)).advantages == (0.0,) * 5
    naive = torch.tensor([0.9] * 5)  # why it is decided on the rewards: an fp32 mean may miss them
    assert not torch.equal(naive - naive.sum() * torch.tensor(1 / 5), torch.zeros(5))


def test_the_spread_that_is_logged_is_the_one_that_advantages_divide_by():
    groups = [_group((1.0, 0.0, 0.0, 0.0)), _group((0.9, 0.9, 0.9)), _group((0.4,))]  # 0.5; equal; one of supervision
    assert rollout_sums(groups, merge_unit=4)["group/reward_std"] == (0.5, 3.0)


def test_advantages_do_not_depend_on_shift_and_scale():
    base = group_advantages((0.1, 0.9, 0.3, 0.1, 0.5))
    assert group_advantages((10.1, 10.9, 10.3, 10.1, 10.5)) == pytest.approx(base, rel=1e-9)
    assert group_advantages((1.0, 9.0, 3.0, 1.0, 5.0)) == pytest.approx(base, rel=1e-4)
    assert sum(base) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("rewards", [(1.0, nan), (1.0, inf), (1.0, -inf)])
def test_a_reward_that_is_not_finite_names_its_prompt(rewards: tuple[float, ...]):
    with pytest.raises(ValueError, match=r"prompt row-7: rewards \[.*\] are not all finite"):
        with_advantages(_group(rewards))


def test_missing_rewards_name_their_prompt():
    with pytest.raises(ValueError, match="prompt row-7: 2 rewards for 3 rollouts"):
        with_advantages(_group((1.0, 0.0), num_rollouts=3))


def test_dynamic_sampling_keeps_groups_of_mixed_accuracy():
    sampling = DynamicSamplingConfig(enabled=True)
    cases = {(0.0,) * 5: False, (1.0,) * 5: False, (1.0, 0.0, 0.0, 0.0, 0.0): True, (1.0, 1.0, 1.0, 1.0, 0.0): True}
    assert {accuracy: keep_group(_group(accuracy, accuracy), sampling) for accuracy in cases} == cases
    half = DynamicSamplingConfig(enabled=True, low=0.5, high=0.9)  # strictly between
    assert not keep_group(_group((1.0, 0.0), (1.0, 0.0)), half)
    with pytest.raises(ValueError, match="row-7: dynamic sampling needs the reward part `accuracy`"):
        keep_group(_group((1.0, 0.0)), sampling)
