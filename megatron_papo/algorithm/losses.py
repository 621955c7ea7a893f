"""The PAPO objective per response token, in nats and fp32. Pure torch.

Every term is a weighted sum: `weights_R` and `perception_weights_R` already hold each token's share in the global
mean, so micro-batches and data-parallel ranks add up and no layout changes the gradient. Importance weights between
the engine's log-probs and the trainer's are in `algorithm/importance_weights.py`.
Departs from the paper: by default no gradient flows through the masked branch, and the ratio within k3 is
pi_masked / pi. docs/departures.md has these and all others, from the paper's reference code too.
Source: Perception-Aware Policy Optimization, arXiv 2507.06448; dual clip, arXiv 1912.09729.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_papo.algorithm.importance_weights import correction_weights
from megatron_papo.config import Config, EntropyConfig, LossConfig, PerceptionConfig
from megatron_papo.types import HeadOutputs, Metrics, MicroBatch


@dataclass(frozen=True)
class LossSettings:
    """What `papo_loss` needs to know of one optimizer step."""

    loss: LossConfig
    perception: PerceptionConfig
    entropy: EntropyConfig
    perception_coef: float
    """Of this step: after the schedule and the guard."""
    entropy_coef: float
    """Of this step, as the next: after the schedule."""
    masked_entropy_coef: float
    first_update: bool = True
    """Whether the policy is still the one that the rollout batch began with."""

    @classmethod
    def at_step(cls, config: Config, step: int, guard_factor: float = 1.0) -> LossSettings:
        """Of the first update of `step` (from 0). The guard lowers gamma alone: the entropy terms hold against the same
        collapse, and would be lowered with it just when they are needed."""
        loss, gamma, share = config.loss, perception_coef(config, step), schedule_share(config, step)
        return cls(
            loss,
            config.perception,
            config.entropy,
            perception_coef=gamma * guard_factor,
            entropy_coef=loss.entropy_coef * share,
            masked_entropy_coef=loss.masked_entropy_coef * share,
        )


def perception_coef(config: Config, step: int) -> float:
    """Gamma at `step` (from 0), before the guard: linear from loss.perception_coef to perception.coef_end over
    perception.coef_steps, constant after that and without a schedule."""
    start, end, steps = config.loss.perception_coef, config.perception.coef_end, config.perception.coef_steps
    if end is None or steps is None:
        return start
    return start + (end - start) * min(step / steps, 1.0)


def schedule_share(config: Config, step: int) -> float:
    """What the schedule of gamma leaves of both entropy coefficients at `step`: gamma as a share of the larger of the
    schedule's two ends, so that a schedule that rises from 0 brings them up to what the settings say. 1 without one."""
    highest = max(config.loss.perception_coef, config.perception.coef_end or 0.0)
    return perception_coef(config, step) / highest if highest > 0 else 1.0


def papo_loss(outputs: HeadOutputs, row: MicroBatch, settings: LossSettings) -> tuple[Tensor, Metrics]:
    """This micro-batch's part of the loss (a scalar to be summed, never averaged), and its metrics, detached.

    `loss/NAME` is what a term adds to the loss, coefficient and sign included, with a count of 0: one micro-batch
    does not know how many make a step (`Metrics`). The others are means over the response tokens that a loss reads,
    those of the masked view over the tokens whose prompt has an image (a count of 0 when there is none). Without old
    log-probs the first update is on-policy. What compares engine and trainer is measured where the old policy's
    log-probs are known: not from the second update on with `loss.old_logprobs=rollout`.
    """
    seen = _measure(outputs, row, settings)
    parts = {
        name: factor * (weights_R * values_R).sum()
        for name, factor, weights_R, values_R in _terms(seen, row, settings)
        if factor != 0
    }
    total = torch.stack(list(parts.values())).sum()
    with torch.no_grad():
        sums = {f"loss/{name}": _summand(part) for name, part in (parts | {"total": total}).items()}
        for name, values_R, over_R in _means(seen, row, settings.loss):
            sums[name] = (values_R * over_R).sum(), over_R.sum()
        if seen.trainer_R is not None:
            gap_R = (seen.trainer_R - row.rollout_logprobs_R).abs() * row.loss_mask_R
            sums["rollout_gap_max"] = gap_R.max(), gap_R.new_ones(())
    return total, _metrics(sums)


def sft_loss(outputs: HeadOutputs, row: MicroBatch) -> tuple[Tensor, Metrics]:
    """Cross-entropy of the demonstrations' tokens: the weighted sum of -log-prob, to be summed over micro-batches."""
    total = -(row.weights_R * outputs.policy_logprobs_R).sum()
    read_R = row.loss_mask_R
    logprobs = ((outputs.policy_logprobs_R * read_R).sum(), read_R.sum())
    return total, _metrics({"loss/total": _summand(total), "policy_logprobs": logprobs})


def policy_term(policy_R: Tensor, old_R: Tensor, advantages_R: Tensor, loss: LossConfig) -> Tensor:
    """max(-A rho, -A clip(rho, 1 - low, 1 + high)), for A < 0 no worse than -A dual_clip; [R]."""
    ratio_R = _ratio(policy_R, old_R)
    clipped_R = ratio_R.clamp(1 - loss.clip_low, 1 + loss.clip_high)
    worst_R = torch.maximum(-advantages_R * ratio_R, -advantages_R * clipped_R)
    if loss.dual_clip is None:
        return worst_R
    return torch.where(advantages_R < 0, torch.minimum(worst_R, -advantages_R * loss.dual_clip), worst_R)


def kl_k3(logprobs_T: Tensor, other_T: Tensor) -> Tensor:
    """k3 estimate of KL(policy || other), nats per token; >= 0, zero iff equal (Schulman 2020); at most 10."""
    gap_T = (other_T - logprobs_T).clamp(-20, 20)  # before exp: inf * 0 is NaN in backward
    return (gap_T.expm1() - gap_T).clamp(-10, 10)


def perception_term(kl_R: Tensor, row: MicroBatch, perception: PerceptionConfig) -> Tensor:
    """The perception KL as the loss reads it: bounded by `clamp`, zero outside each response's `top_fraction`.

    The denominator stays all response tokens, so a smaller fraction is never a larger push on a token.
    """
    read_R = kl_R if perception.clamp is None else kl_R.clamp(0, perception.clamp)
    if perception.top_fraction == 1.0:
        return read_R
    return read_R * top_tokens(kl_R, row.rollout_index_R, row.loss_mask_R & row.has_image_R, perception.top_fraction)


@torch.no_grad()
def top_tokens(values_R: Tensor, rollout_index_R: Tensor, eligible_R: Tensor, fraction: float) -> Tensor:
    """[R] bool: within each response, the ceil(fraction x eligible) eligible tokens of highest value; of equal ones,
    the earlier. Whole responses lie in one micro-batch, so the choice does not depend on how a batch is split."""
    num_R = torch.zeros_like(rollout_index_R)  # tokens by response; there are no more responses than tokens
    starts_R = num_R.index_add(0, rollout_index_R, torch.ones_like(rollout_index_R)).cumsum(0).roll(1)
    starts_R[:1] = 0
    num_eligible_R = num_R.index_add(0, rollout_index_R, eligible_R.to(num_R.dtype))
    kept_R = (num_eligible_R.double() * fraction - 1e-9).ceil()  # 0.14 x 50 is a little more than 7
    order_R = values_R.masked_fill(~eligible_R, -torch.inf).argsort(descending=True, stable=True)
    order_R = order_R[rollout_index_R[order_R].argsort(stable=True)]
    response_R = rollout_index_R[order_R]
    rank_R = torch.arange(order_R.numel(), device=order_R.device) - starts_R[response_R]
    return torch.zeros_like(eligible_R).index_put((order_R,), rank_R < kept_R[response_R])


def _ratio(policy_R: Tensor, old_R: Tensor) -> Tensor:
    return (policy_R - old_R).clamp(-20, 20).exp()


@dataclass(frozen=True)
class _Measured:
    """What the terms are made of, [R] each; None where a model was not scored because nothing reads it."""

    policy_R: Tensor
    old_R: Tensor
    """What the ratio is taken against."""
    entropy_R: Tensor
    trainer_R: Tensor | None = None
    """The old policy's log-probs as the trainer computes them, what the engine's are compared with."""
    correction_R: Tensor | None = None
    ref_kl_R: Tensor | None = None
    perception_kl_R: Tensor | None = None
    masked_entropy_R: Tensor | None = None


def _measure(outputs: HeadOutputs, row: MicroBatch, settings: LossSettings) -> _Measured:
    policy_R, loss = outputs.policy_logprobs_R, settings.loss
    assert loss.reference_coef == 0 or row.ref_logprobs_R is not None, "the reference was not scored"
    trainer_R = policy_R.detach() if settings.first_update else None
    trainer_R = trainer_R if row.old_logprobs_R is None else row.old_logprobs_R
    old_R = row.rollout_logprobs_R if loss.old_logprobs == "rollout" else trainer_R
    assert old_R is not None, "the old policy was not scored"
    seen = _Measured(
        policy_R=policy_R,
        old_R=old_R,
        entropy_R=_entropy(settings.entropy.kind, policy_R, outputs.entropy_R, settings.entropy_coef),
        trainer_R=trainer_R,
        correction_R=None if trainer_R is None else correction_weights(trainer_R, row, loss),
        ref_kl_R=None if row.ref_logprobs_R is None else kl_k3(policy_R, row.ref_logprobs_R),
    )
    joint = settings.perception.masked_branch == "joint"
    masked_R = outputs.masked_logprobs_R if joint else row.masked_logprobs_R
    if masked_R is None:
        needed = settings.perception_coef > 0 or settings.masked_entropy_coef > 0
        assert not (needed and row.has_image_R.any()), "the masked view was not scored"
        if not needed:
            return seen
        masked_R = policy_R.detach()  # without an image there is nothing to mask, and every weight is zero
    kl_R = outputs.perception_kl_R if settings.perception.kl == "full" else kl_k3(policy_R, masked_R)
    assert kl_R is not None, "perception.kl=full, but the head was not asked for it"
    kind = settings.entropy.kind if joint else "sampled"  # a frozen branch keeps no logits
    masked_entropy_R = _entropy(kind, masked_R, outputs.masked_entropy_R, settings.masked_entropy_coef)
    return replace(seen, perception_kl_R=kl_R, masked_entropy_R=masked_entropy_R)


def _entropy(kind: str, logprobs_R: Tensor, full_R: Tensor | None, coef: float) -> Tensor:
    """-log-prob of the sampled token, or the whole vocabulary's; without a coefficient the former will do."""
    if kind == "full" and full_R is not None:
        return full_R
    assert kind == "sampled" or coef == 0, "entropy.kind=full, but the head was not asked for it"
    return -logprobs_R


_Term = tuple[str, float, Tensor, Tensor]
"""name, coefficient with sign, weights, values"""


def _terms(seen: _Measured, row: MicroBatch, settings: LossSettings) -> Iterator[_Term]:
    loss, weights_R, image_weights_R = settings.loss, row.weights_R, row.perception_weights_R
    term_R = policy_term(seen.policy_R, seen.old_R, row.advantages_R, loss)
    yield "policy", 1.0, weights_R, term_R if seen.correction_R is None else term_R * seen.correction_R
    yield "entropy", settings.entropy_coef, weights_R, seen.entropy_R
    if seen.ref_kl_R is not None:
        yield "reference", loss.reference_coef, weights_R, seen.ref_kl_R
    if seen.perception_kl_R is not None:
        read_R = perception_term(seen.perception_kl_R, row, settings.perception)
        yield "perception", -settings.perception_coef, image_weights_R, read_R
    if seen.masked_entropy_R is not None:
        yield "masked_entropy", settings.masked_entropy_coef, image_weights_R, seen.masked_entropy_R


def _means(seen: _Measured, row: MicroBatch, loss: LossConfig) -> Iterator[tuple[str, Tensor, Tensor]]:
    """name, values, and the tokens that the mean is over."""
    tokens_R, image_R = row.loss_mask_R, row.loss_mask_R & row.has_image_R
    ratio_R, worse_R = _ratio(seen.policy_R, seen.old_R), row.advantages_R < 0
    yield "policy_logprobs", seen.policy_R, tokens_R
    yield "entropy", seen.entropy_R, tokens_R
    yield "ratio", ratio_R, tokens_R
    yield "policy_kl", kl_k3(seen.old_R, seen.policy_R), tokens_R  # KL(old || policy): the tokens are old's
    low_R = worse_R & (ratio_R < 1 - loss.clip_low)
    high_R = (row.advantages_R > 0) & (ratio_R > 1 + loss.clip_high)
    yield "clip_low", low_R, tokens_R
    yield "clip_high", high_R, tokens_R
    yield "clip_fraction", low_R | high_R, tokens_R
    yield "clip_dual", worse_R & (ratio_R > (loss.dual_clip or torch.inf)), tokens_R
    if seen.trainer_R is not None:
        yield "rollout_gap", (seen.trainer_R - row.rollout_logprobs_R).abs(), tokens_R
        yield "rollout_kl", kl_k3(row.rollout_logprobs_R, seen.trainer_R), tokens_R  # KL(engine || trainer)
    if seen.correction_R is not None:
        yield "correction", seen.correction_R, tokens_R
        lost_R = seen.correction_R == (0 if loss.correction == "masked" else loss.correction_cap)
        yield "correction_cut", lost_R, tokens_R
    if seen.ref_kl_R is not None:
        yield "ref_kl", seen.ref_kl_R, tokens_R
    if seen.perception_kl_R is not None:
        yield "perception_kl", seen.perception_kl_R, image_R
        yield "perception_kl_squared", seen.perception_kl_R.square(), image_R
    if seen.masked_entropy_R is not None:
        yield "masked_entropy", seen.masked_entropy_R, image_R


def _summand(part: Tensor) -> tuple[Tensor, Tensor]:
    return part, torch.zeros_like(part)


def _metrics(sums: dict[str, tuple[Tensor, Tensor]]) -> Metrics:
    """One copy to the host for all of them."""
    flat = torch.stack([value.detach().double() for pair in sums.values() for value in pair]).tolist()
    return dict(zip(sums, zip(flat[::2], flat[1::2])))
