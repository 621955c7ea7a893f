"""Where another method adds its part: a policy loss by name, credit by token or response, reductions by response."""

from __future__ import annotations

import importlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from megatron_papo.algorithm import policy_losses
from megatron_papo.algorithm.estimators import probability_ratio
from megatron_papo.algorithm.loss_settings import LossSettings
from megatron_papo.algorithm.losses import papo_loss
from megatron_papo.algorithm.policy_losses import POLICY_LOSSES
from megatron_papo.algorithm.sequences import response_means, response_sums, top_tokens
from megatron_papo.algorithm.token_scores import TokenScores
from megatron_papo.config import ConfigError, LossConfig, load_config
from megatron_papo.types import HeadOutputs, MicroBatch
from tests.unit.test_losses import F64, _config, _parts, _row

GUIDES = Path(__file__).parents[2] / "docs" / "guides"
RESPONSES = torch.tensor([0, 0, 0, 1])


def test_the_settings_know_every_policy_loss_and_no_other():
    assert get_args(LossConfig.model_fields["policy_loss"].annotation) == tuple(POLICY_LOSSES)
    with pytest.raises(ConfigError, match=r"loss\.policy_loss: Input should be 'clipped'.*, got 'gspo'"):
        load_config(None, ["loss.policy_loss=gspo"])


def _sequence_ratio(policy_R: Tensor, old_R: Tensor, advantages_R: Tensor, row: MicroBatch, loss: LossConfig) -> Tensor:
    """A response's geometric mean of its tokens' ratios times the advantage, without a clip."""
    means_R = response_means(policy_R - old_R, row.rollout_index_R, row.loss_mask_R)
    return -advantages_R * probability_ratio(means_R, torch.zeros_like(means_R))


def test_a_policy_loss_is_chosen_by_its_name_and_may_read_whole_responses(monkeypatch):
    monkeypatch.setitem(POLICY_LOSSES, "sequence_ratio", _sequence_ratio)
    settings = LossSettings.at_step(_config(), 0)
    chosen = settings.loss.model_copy(update={"policy_loss": "sequence_ratio"})
    policy = F64([1.0, 2.0, 6.0, 0.5], requires_grad=True)
    row = _row(old_logprobs_R=torch.zeros(4, dtype=torch.float64))
    total, _ = papo_loss(HeadOutputs(policy), row, replace(settings, loss=chosen))
    total.backward()
    first, second = torch.tensor(3.0).double().exp(), torch.tensor(0.5).double().exp()
    assert total.item() == pytest.approx(((-3 * first + second) / 8).item())
    assert policy.grad.tolist() == pytest.approx([(-first / 8).item()] * 3 + [(second / 8).item()])


def _example(guide: str, module: str) -> dict[str, Any]:
    """What the first block of code in `guide` defines, run as if it stood in `module`."""
    names = dict(vars(importlib.import_module(module)))
    exec((GUIDES / guide).read_text().split("```python\n")[1].split("```")[0], names)
    return names


def test_the_examples_of_the_guides_run():
    names = _example("add_a_policy_loss.md", policy_losses.__name__)
    assert tuple(names["POLICY_LOSSES"]) == (*POLICY_LOSSES, "sequence_clipped")
    row, loss = _row(), LossConfig(clip_low=0.2, clip_high=0.3)
    policy_R, old_R = F64([0.1, 0.2, 0.3, 0.5]), torch.zeros(4, dtype=torch.float64)
    losses_R = names["sequence_clipped"](policy_R, old_R, row.advantages_R, row, loss)
    assert losses_R.tolist() == pytest.approx([-math.exp(0.2)] * 3 + [math.exp(0.5)])
    reward = _example("add_an_engine_or_a_reward.md", "math")["half_for_naming"]
    assert [reward(text, "3", "") for text in (r"\boxed{3}", "it is 3", "no")] == [1.0, 0.5, 0.0]


def test_credit_weighs_the_policy_term_and_nothing_else():
    def most_perceptive(scores: TokenScores, row: MicroBatch) -> Tensor:
        """The third of each response's tokens that the mask changes most; the second response counts twice."""
        assert not any(value.requires_grad for value in vars(scores).values() if value is not None)
        assert scores.masked_R is not None and scores.perception_kl_R is not None
        chosen_R = top_tokens(scores.perception_kl_R, row.rollout_index_R, row.loss_mask_R, 1 / 3)
        return chosen_R * F64([1.0, 1.0, 1.0, 2.0])

    coefs = {"perception_coef": 0.02, "entropy_coef": 0.03}
    settings = LossSettings.at_step(_config(coefs), 0)
    row = _row(masked_logprobs_R=F64([-1.0, -4.0, -2.0, -1.0]))
    policy = F64([-1.0, -1.0, -1.0, -1.0], requires_grad=True)
    _, plain = papo_loss(HeadOutputs(policy), row, settings)
    total, credited = papo_loss(HeadOutputs(policy), row, settings, most_perceptive)
    others = {name: value for name, value in _parts(plain).items() if name not in ("policy", "total")}
    assert _parts(credited) == others | {"policy": (-1.0 + 2.0) / 8, "total": pytest.approx(total.item())}
    assert {name: credited[name] for name in plain if not name.startswith("loss/")} == {
        name: value for name, value in plain.items() if not name.startswith("loss/")
    }


def test_credit_of_one_everywhere_is_no_credit_to_the_bit():
    settings = LossSettings.at_step(_config({"perception_coef": 0.02}), 0)
    torch.manual_seed(0)
    row = _row(advantages_R=torch.randn(4), old_logprobs_R=torch.randn(4), masked_logprobs_R=torch.randn(4))
    leaves = [torch.linspace(-2, 0, 4).requires_grad_() for _ in range(2)]
    plain, _ = papo_loss(HeadOutputs(leaves[0]), row, settings)
    ones, _ = papo_loss(HeadOutputs(leaves[1]), row, settings, lambda scores, row: torch.ones_like(scores.policy_R))
    assert plain.item() == ones.item()
    gradients = [torch.autograd.grad(loss, leaf)[0] for loss, leaf in zip((plain, ones), leaves)]
    assert gradients[0].tolist() == gradients[1].tolist()


def test_reductions_by_response_by_hand():
    values, mask = F64([1.0, 2.0, 6.0, 5.0]), torch.tensor([True, False, True, False])
    assert response_sums(values, RESPONSES).tolist() == [9.0, 5.0, 0.0, 0.0]
    assert response_means(values, RESPONSES, mask).tolist() == [3.5, 3.5, 3.5, 0.0]
