"""The objective against hand-computed values and finite differences, the guard as a table of steps."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import exp, inf, log

import pytest
import torch
from torch import Tensor

from megatron_papo.algorithm.estimators import kl_k3
from megatron_papo.algorithm.loss_settings import LossSettings, perception_coef
from megatron_papo.algorithm.losses import papo_loss, sft_loss
from megatron_papo.algorithm.policy_losses import clipped
from megatron_papo.algorithm.sequences import top_tokens
from megatron_papo.config import Config, LossConfig
from megatron_papo.logprobs import vocab_parallel_head
from megatron_papo.types import HeadOutputs, MicroBatch, Segment

F64 = partial(torch.tensor, dtype=torch.float64)
NO_COEFS = {"perception_coef": 0.0, "reference_coef": 0.0, "entropy_coef": 0.0, "masked_entropy_coef": 0.0}


def _config(loss: dict | None = None, **sections: dict) -> Config:
    return Config.model_validate({"loss": NO_COEFS | (loss or {}), **sections})


def _row(**changes: Tensor) -> MicroBatch:
    """Tokens 0 to 2 answer a prompt with an image, token 3 one without; weights of a global mean over 8 tokens, 6 of
    them with an image."""
    row = MicroBatch(
        token_ids_T=torch.arange(6),
        position_ids_3T=torch.arange(6).expand(3, -1),
        segments=(Segment(4), Segment(2)),
        pixel_values=(),
        grid_thw_I3=None,
        target_ids_R=torch.tensor([1, 2, 3, 5]),
        logit_index_R=torch.tensor([0, 1, 2, 4]),
        rollout_index_R=torch.tensor([0, 0, 0, 1]),
        loss_mask_R=torch.ones(4, dtype=torch.bool),
        has_image_R=torch.tensor([True, True, True, False]),
        weights_R=F64([1 / 8] * 4),
        perception_weights_R=F64([1 / 6] * 3 + [0]),
        advantages_R=F64([1.0, 1.0, 1.0, -1.0]),
        rollout_logprobs_R=F64([-1.0, -1.0, -1.0, -1.0]),
    )
    return replace(row, **changes)


def _means(metrics: dict[str, tuple[float, float]]) -> dict[str, float]:
    return {name: numerator / count for name, (numerator, count) in metrics.items() if count}


def _parts(metrics: dict[str, tuple[float, float]]) -> dict[str, float]:
    """What a micro-batch adds to the loss; that it is counted once a step is the pipeline's affair."""
    parts = {name: pair for name, pair in metrics.items() if name.startswith("loss/")}
    assert {count for _, count in parts.values()} == {0.0}
    return {name.removeprefix("loss/"): numerator for name, (numerator, _) in parts.items()}


def test_policy_term_by_hand():
    ratios = F64([1.5, 0.5, 0.5, 4.0, 2.0, 1.0])
    advantages = F64([1.0, 1.0, -1.0, -1.0, -2.0, 0.5])
    # low .2, high .3, dual clip 3:
    # A=1: max(-1.5, -1.3); max(-.5, -.8).  A=-1: max(.5, .8); max(4, 1.3) cut to 3.  A=-2: max(4, 2.6) below 6.  -.5
    loss = LossConfig()
    terms = clipped(ratios.log(), torch.zeros(6, dtype=torch.float64), advantages, _row(), loss)
    torch.testing.assert_close(terms, F64([-1.3, -0.5, 0.8, 3.0, 4.0, -0.5]))
    unbounded = clipped(ratios.log(), torch.zeros(6), advantages, _row(), loss.model_copy(update={"dual_clip": None}))
    assert unbounded[3].item() == pytest.approx(4.0)


def test_ratio_is_bounded_before_exp():
    loss = LossConfig(dual_clip=None)
    found = clipped(F64([50.0, -50.0, inf]), torch.zeros(3), F64([-1.0, 1.0, -1.0]), _row(), loss)
    assert found.tolist() == pytest.approx([exp(20), -exp(-20), exp(20)])


def test_clip_fractions_follow_the_sign_of_the_advantage():
    ratios, advantages = [4.0, 4.0, 2.0, 0.5, 0.5, 1.0], [1.0, -1.0, -1.0, 1.0, -1.0, 0.0]
    # high: the 4 at A = 1.  dual: the 4 at A = -1.  low: the 0.5 at A = -1
    row = _wide_row(advantages, old=-F64(ratios).log() - 1)
    _, metrics = papo_loss(HeadOutputs(F64([-1.0] * 6)), row, LossSettings.at_step(_config(), 0))
    assert [metrics[f"clip_{side}"] for side in ("low", "high", "dual")] == [(1.0, 6.0)] * 3
    assert metrics["clip_fraction"] == (2.0, 6.0)  # what the guard watches: clipped at either sign of the advantage


def _wide_row(advantages: list[float], old: Tensor) -> MicroBatch:
    """As many text tokens as advantages, one response."""
    num = len(advantages)
    return _row(
        rollout_index_R=torch.zeros(num, dtype=torch.int64),
        loss_mask_R=torch.ones(num, dtype=torch.bool),
        has_image_R=torch.zeros(num, dtype=torch.bool),
        weights_R=F64([1 / num] * num),
        perception_weights_R=torch.zeros(num),
        advantages_R=F64(advantages),
        rollout_logprobs_R=old,
        old_logprobs_R=old,
    )


def test_policy_term_gradient_is_minus_advantage_on_policy_and_zero_where_clipped():
    policy = F64([0.0, log(1.5), log(0.5), log(4.0)], requires_grad=True)
    clipped(policy, torch.zeros(4), F64([0.7, 1.0, -1.0, -1.0]), _row(), LossConfig()).sum().backward()
    assert policy.grad.tolist() == pytest.approx([-0.7, 0.0, 0.0, 0.0])


def test_k3_by_hand():
    # gap ln 2: 2 - ln 2 - 1.  gap -ln 2: 1/2 + ln 2 - 1.  gap 30, cut to 20: e^20 - 21, at most 10.
    # gap -30, cut to -20: e^-20 + 20 - 1, at most 10.  gap -inf: the same.
    gaps = F64([log(2), -log(2), 30.0, -30.0, -inf, 0.0])
    expected = [1 - log(2), log(2) - 0.5, 10.0, 10.0, 10.0, 0.0]
    assert kl_k3(torch.zeros(6), gaps).tolist() == pytest.approx(expected, abs=1e-12)


def test_k3_gradient_is_one_minus_the_ratio_and_finite_at_the_bounds():
    logprobs = F64([0.0, 0.0, 0.0, 0.0], requires_grad=True)
    kl_k3(logprobs, F64([log(2), -log(2), 400.0, -400.0])).sum().backward()
    assert logprobs.grad.tolist() == pytest.approx([-1.0, 0.5, 0.0, 0.0])


def test_k3_of_nearly_equal_fp32_logprobs_is_never_negative():
    logprobs = -torch.rand(4096, generator=torch.Generator().manual_seed(0)) * 12
    assert kl_k3(logprobs, logprobs + 1e-4).min() >= 0


def test_whole_objective_by_hand():
    row = _row(
        old_logprobs_R=F64([-1.0, -1.0 - log(1.5), -1.0, -1.0 + log(2)]),  # ratios 1, 1.5, 1, 0.5
        ref_logprobs_R=F64([-1.0, -1.0, -1.0 + log(2), -1.0]),  # gaps 0, 0, ln 2, 0
        masked_logprobs_R=F64([-1.0 - log(2), -1.0, -1.0 + log(2), -9.0]),  # gaps -ln 2, 0, ln 2; the last unread
    )
    outputs = HeadOutputs(policy_logprobs_R=F64([-1.0, -1.0, -1.0, -1.0]))
    coefs = {"perception_coef": 0.02, "reference_coef": 0.01, "entropy_coef": 0.05, "masked_entropy_coef": 0.04}
    config = _config(coefs, perception={"masked_branch": "frozen"})
    total, metrics = papo_loss(outputs, row, LossSettings.at_step(config, 0))
    policy = (-1.0 - 1.3 - 1.0 + 0.8) / 8  # the last: A = -1, max(0.5, 0.8)
    reference = 0.01 * (1 - log(2)) / 8
    kl = [log(2) - 0.5, 0.0, 1 - log(2)]  # sums to 0.5
    perception = -0.02 * 0.5 / 6
    entropy, masked_entropy = 0.05 * 4 / 8, 0.04 * 3 / 6  # ln 2 cancels within the three masked log-probs
    assert total.item() == pytest.approx(policy + reference + perception + entropy + masked_entropy, abs=1e-12)
    expected = {
        "policy_logprobs": -1.0, "entropy": 1.0, "ratio": 1.0, "clip_low": 0.25, "clip_high": 0.25, "clip_dual": 0.0,
        "clip_fraction": 0.5,
        "policy_kl": (1.5 - log(1.5) - 1 + 0.5 + log(2) - 1) / 4, "rollout_gap": (log(1.5) + log(2)) / 4,
        "rollout_gap_max": log(2), "rollout_kl": (1 / 1.5 + log(1.5) - 1 + 2 - log(2) - 1) / 4,
        "ref_kl": (1 - log(2)) / 4, "perception_kl": 0.5 / 3,
        "perception_kl_squared": (kl[0] ** 2 + kl[2] ** 2) / 3, "masked_entropy": 1.0,
    }  # fmt: skip
    parts = {
        "policy": policy, "reference": reference, "perception": perception, "entropy": entropy,
        "masked_entropy": masked_entropy, "total": total.item(),
    }  # fmt: skip
    assert _parts(metrics) == pytest.approx(parts, abs=1e-12)
    assert _means(metrics) == pytest.approx(expected, abs=1e-12)
    assert metrics["perception_kl"][1] == 3.0 and metrics["ref_kl"][1] == 4.0


def test_no_old_logprobs_means_on_policy():
    policy = F64([-1.0, -2.0, -3.0, -4.0], requires_grad=True)
    total, metrics = papo_loss(HeadOutputs(policy), _row(), LossSettings.at_step(_config(), 0))
    total.backward()
    assert total.item() == pytest.approx((-1 - 1 - 1 + 1) / 8)
    assert policy.grad.tolist() == pytest.approx([-1 / 8, -1 / 8, -1 / 8, 1 / 8])
    assert _means(metrics)["ratio"] == 1.0 and _means(metrics)["clip_dual"] == 0.0


LEAVES = ("policy_logprobs_R", "masked_logprobs_R", "entropy_R", "masked_entropy_R", "perception_kl_R")


@pytest.mark.parametrize(
    ("coefs", "perception", "reached"),
    [
        ({}, {}, {"policy_logprobs_R"}),
        ({"reference_coef": 0.3}, {}, {"policy_logprobs_R"}),
        ({"perception_coef": 0.3}, {}, {"policy_logprobs_R"}),
        ({"perception_coef": 0.3}, {"clamp": 0.2}, {"policy_logprobs_R"}),
        ({"perception_coef": 0.3}, {"masked_branch": "joint"}, {"policy_logprobs_R", "masked_logprobs_R"}),
        (
            {"perception_coef": 0.3},
            {"masked_branch": "joint", "top_fraction": 0.4},
            {"policy_logprobs_R", "masked_logprobs_R"},
        ),
        ({"perception_coef": 0.3}, {"masked_branch": "joint", "kl": "full"}, {"perception_kl_R"}),
        ({"entropy_coef": 0.3}, {}, {"policy_logprobs_R"}),
        ({"entropy_coef": 0.3}, {"entropy": "full"}, {"entropy_R"}),
        ({"masked_entropy_coef": 0.3}, {"masked_branch": "joint"}, {"masked_logprobs_R"}),
        ({"masked_entropy_coef": 0.3}, {"masked_branch": "joint", "entropy": "full"}, {"masked_entropy_R"}),
        ({"masked_entropy_coef": 0.3}, {"masked_branch": "frozen"}, set()),
    ],
)
def test_finite_differences_of_every_term_alone(coefs: dict, perception: dict, reached: set[str]):
    """Each term's gradient is that of its value, and reaches exactly the outputs that it should."""
    kind = perception.get("entropy", "sampled")
    perception = {key: value for key, value in perception.items() if key != "entropy"}
    config = _config(coefs, perception=perception, entropy={"kind": kind})
    row = _row(
        old_logprobs_R=F64([-1.1, -1.4, -0.9, -1.2]),
        ref_logprobs_R=F64([-1.3, -0.8, -1.1, -2.0]),
        masked_logprobs_R=F64([-2.1, -1.0, -1.7, -1.6]),
        advantages_R=F64([0.9, -0.4, 1.2, -0.8]) if not coefs else torch.zeros(4, dtype=torch.float64),
    )

    def loss_of(*leaves: Tensor) -> Tensor:
        return papo_loss(HeadOutputs(**dict(zip(LEAVES, leaves))), row, LossSettings.at_step(config, 0))[0]

    values = ([-1.0, -1.3, -0.7, -1.25], [-2.0, -1.1, -1.6, -1.5], [1.0, 2.0, 0.5, 1.5], [1.2, 1.9, 0.8, 1.4],
              [0.3, 0.1, 0.6, 0.2])  # fmt: skip
    leaves = [F64(value, requires_grad=True) for value in values]
    assert torch.autograd.gradcheck(loss_of, leaves)
    gradients = torch.autograd.grad(loss_of(*leaves), leaves, allow_unused=True)
    moved = {name for name, gradient in zip(LEAVES, gradients) if gradient is not None and gradient.abs().max() > 0}
    assert moved == reached


def test_finite_differences_through_the_head_of_the_joint_full_objective():
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    hidden, masked, weight = (draw(*shape).requires_grad_() for shape in ((4, 3), (4, 3), (9, 3)))
    row = _row(old_logprobs_R=-draw(4).abs() - 1, ref_logprobs_R=-draw(4).abs() - 1, advantages_R=draw(4))
    coefs = {"perception_coef": 0.2, "reference_coef": 0.1, "entropy_coef": 0.3, "masked_entropy_coef": 0.4}
    config = _config(coefs, perception={"masked_branch": "joint", "kl": "full"}, entropy={"kind": "full"})
    head = {"group": None, "vocab_start": 0, "vocab_size": 8, "banned_ids": (4,), "temperature": 0.8, "tile": (3, 5)}

    def loss_of(hidden: Tensor, masked: Tensor, weight: Tensor) -> Tensor:
        values = vocab_parallel_head(hidden, masked, weight, row.target_ids_R, entropy=True, kl=True, **head)
        return papo_loss(HeadOutputs(*values), row, LossSettings.at_step(config, 0))[0]

    assert torch.autograd.gradcheck(loss_of, (hidden, masked, weight))


def test_perception_clamp_bounds_value_and_stops_gradient():
    policy = F64([0.0, 0.0, 0.0, 0.0], requires_grad=True)
    row = _row(masked_logprobs_R=F64([log(2), log(1.1), 0.0, 0.0]), advantages_R=F64([0.0] * 4))
    config = _config({"perception_coef": 1.0}, perception={"clamp": 0.2})
    total, metrics = papo_loss(HeadOutputs(policy), row, LossSettings.at_step(config, 0))
    total.backward()
    # k3: 1 - ln 2 = .307 cut to .2; 0.1 - ln 1.1; the metric keeps what was measured
    assert total.item() == pytest.approx(-(0.2 + 0.1 - log(1.1)) / 6)
    assert policy.grad.tolist() == pytest.approx([0.0, 0.1 / 6, 0.0, 0.0])
    assert _means(metrics)["perception_kl"] == pytest.approx((1 - log(2) + 0.1 - log(1.1)) / 3)


def test_top_tokens_are_chosen_within_each_response():
    values = F64([0.1, 0.9, 0.5, 0.5, 0.2, 3.0, 2.0, 4.0])
    response = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1])
    eligible = torch.ones(8, dtype=torch.bool)
    # fraction .4: ceil(2.0) of five, of the equal ones the earlier; ceil(1.2) of three
    expected = [False, True, True, False, False, True, False, True]
    assert top_tokens(values, response, eligible, 0.4).tolist() == expected
    eligible[7] = eligible[1] = False  # ceil(1.6) of four, ceil(0.8) of two
    expected = [False, False, True, True, False, True, False, False]
    assert top_tokens(values, response, eligible, 0.4).tolist() == expected


def test_top_fraction_of_fourteen_percent_of_fifty_is_seven():
    assert 0.14 * 50 > 7  # in floating point, where ceil would keep one too many
    kept = top_tokens(torch.arange(50.0), torch.zeros(50, dtype=torch.int64), torch.ones(50, dtype=torch.bool), 0.14)
    assert kept.nonzero()[:, 0].tolist() == list(range(43, 50))


def test_text_only_rows_have_no_perception_term_and_count_nothing():
    row = _row(has_image_R=torch.zeros(4, dtype=torch.bool), perception_weights_R=torch.zeros(4))
    config = _config({"perception_coef": 0.5, "masked_entropy_coef": 0.5})
    with_scores = replace(row, masked_logprobs_R=F64([-5.0] * 4))
    for text_row in (row, with_scores):
        total, metrics = papo_loss(HeadOutputs(F64([-1.0] * 4)), text_row, LossSettings.at_step(config, 0))
        assert total.item() == pytest.approx(-2 / 8)
        assert metrics.get("perception_kl", (0.0, 0.0)) == (0.0, 0.0)


def test_tokens_outside_the_loss_mask_are_not_measured():
    row = _row(loss_mask_R=torch.tensor([True, False, True, True]), masked_logprobs_R=F64([-1.0, -8.0, -1.0, -1.0]))
    _, metrics = papo_loss(HeadOutputs(F64([-1.0] * 4)), row, LossSettings.at_step(_config(), 0))
    assert metrics["perception_kl"] == (0.0, 2.0) and metrics["policy_logprobs"] == (-3.0, 3.0)


@pytest.mark.parametrize(
    ("coefs", "sections", "message"),
    [
        ({"reference_coef": 0.1}, {}, "reference was not scored"),
        ({"perception_coef": 0.1}, {}, "masked view was not scored"),
        ({}, {"perception": {"masked_branch": "joint", "kl": "full"}}, "perception.kl=full, but the head"),
        ({"entropy_coef": 0.1}, {"entropy": {"kind": "full"}}, "entropy.kind=full, but the head"),
        (
            {"masked_entropy_coef": 0.1},
            {"entropy": {"kind": "full"}, "perception": {"masked_branch": "joint"}},
            "entropy.kind=full, but the head",
        ),
    ],
)
def test_a_term_without_its_scores_is_refused(coefs: dict, sections: dict, message: str):
    config = _config(coefs, **sections)
    outputs = HeadOutputs(F64([-1.0] * 4), masked_logprobs_R=F64([-1.0] * 4))
    with pytest.raises(AssertionError, match=message):
        papo_loss(outputs, _row(), LossSettings.at_step(config, 0))


def test_supervised_loss_by_hand():
    policy = F64([-1.0, -2.0, -3.0, -4.0], requires_grad=True)
    total, metrics = sft_loss(HeadOutputs(policy), _row())
    total.backward()
    assert total.item() == pytest.approx(10 / 8)
    assert policy.grad.tolist() == [-1 / 8] * 4
    assert _parts(metrics) == {"total": 1.25} and _means(metrics) == {"policy_logprobs": -2.5}


def test_perception_coefficient_over_steps():
    linear = _config({"perception_coef": 0.04}, perception={"coef_end": 0.01, "coef_steps": 3})
    assert [perception_coef(linear, step) for step in range(5)] == pytest.approx([0.04, 0.03, 0.02, 0.01, 0.01])
    assert perception_coef(_config({"perception_coef": 0.04}), 100) == 0.04


@pytest.mark.parametrize(
    ("start", "end", "gammas", "shares"),
    [
        (0.04, 0.01, [0.04, 0.025, 0.01, 0.01], [1.0, 0.625, 0.25, 0.25]),
        (0.04, 0.0, [0.04, 0.02, 0.0, 0.0], [1.0, 0.5, 0.0, 0.0]),
        (0.01, 0.04, [0.01, 0.025, 0.04, 0.04], [0.25, 0.625, 1.0, 1.0]),  # never above what the settings say
        (0.0, 0.04, [0.0, 0.02, 0.04, 0.04], [0.0, 0.5, 1.0, 1.0]),
        (0.0, 0.0, [0.0] * 4, [1.0] * 4),  # nothing is annealed
        (0.04, None, [0.04] * 4, [1.0] * 4),
    ],
)
def test_both_entropy_coefficients_follow_the_schedule_of_gamma_and_not_the_guard(start, end, gammas, shares):
    schedule = {} if end is None else {"coef_end": end, "coef_steps": 2}
    coefs = {"perception_coef": start, "entropy_coef": 0.03, "masked_entropy_coef": 0.05}
    config = _config(coefs, perception=schedule)
    for guard_factor in (1.0, 0.25):
        found = [LossSettings.at_step(config, step, guard_factor) for step in range(4)]
        assert [each.perception_coef for each in found] == pytest.approx([gamma * guard_factor for gamma in gammas])
        assert [each.entropy_coef for each in found] == pytest.approx([0.03 * share for share in shares])
        assert [each.masked_entropy_coef for each in found] == pytest.approx([0.05 * share for share in shares])


def test_an_annealed_entropy_term_is_what_the_loss_adds():
    coefs = {"perception_coef": 0.02, "entropy_coef": 0.03, "masked_entropy_coef": 0.05}
    config = _config(coefs, perception={"coef_end": 0.0, "coef_steps": 2})
    row, outputs = _row(masked_logprobs_R=F64([-2.0] * 4)), HeadOutputs(F64([-1.0] * 4))
    parts = [_parts(papo_loss(outputs, row, LossSettings.at_step(config, step))[1]) for step in range(3)]
    assert [part.get("entropy", 0.0) for part in parts] == pytest.approx([0.03 / 2, 0.015 / 2, 0.0])
    assert [part.get("masked_entropy", 0.0) for part in parts] == pytest.approx([0.05, 0.025, 0.0])


def test_a_later_update_without_old_logprobs_is_refused():
    later = replace(LossSettings.at_step(_config(), 0), first_update=False)
    with pytest.raises(AssertionError, match="old policy was not scored"):
        papo_loss(HeadOutputs(F64([-1.0] * 4)), _row(), later)
